"""What a training step costs is one figure, counted whole or as the host's share and what its sites add."""

import pytest
import torch
from identity import KINDS, build_kind, samples
from kasmina_support import PUBLIC, Driver, Shelf, assert_equal, class_loss, fingerprint
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.config import KasminaConfig
from esper.kasmina import wrap
from esper.leyline import Action, SeedStage, SiteKind
from esper.tolaria.costs import HostCosts
from esper.tolaria.precision import FULL, Precision

DESIGNS = {
    SiteKind.VECTOR: ("mlp_adapter", "norm_replace"),
    SiteKind.SEQUENCE: ("transformer_block", "gated_mlp"),
    SiteKind.FEATURE_MAP: ("residual_conv", "conv_replace"),
}
BF16 = Precision("bf16")


class Counting(HostCosts):
    """Tells how often the whole host was run."""

    def __init__(self, host, *, precision=FULL):
        self.num_whole = 0
        super().__init__(host, self._loss, precision=precision)

    def _loss(self, outputs, targets):
        self.num_whole += 1
        return class_loss(outputs, targets)


def growing(model, batch, *, causal=False, sites="auto"):
    host = wrap(model, example=(batch[0],), causal=causal, sites=sites, config=KasminaConfig())
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host)
    driver.batches, driver.shelf = [batch], shelf
    return driver


def graft(driver, site, design):
    seed_id = next(v.seed_id for v in driver.host.seeds() if v.site == site and v.stage is SeedStage.DORMANT)
    driver.to_grafting(site, driver.shelf.put(design, driver.host.sites[site]), seed_id)
    return seed_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_graft_is_counted_at_its_site_alone_and_exactly(kind):
    batch, other = samples(kind, 6), samples(kind, 3)
    driver = growing(build_kind(kind), batch, causal=kind == "gpt")
    costs = {precision: Counting(driver.host, precision=precision) for precision in (FULL, BF16)}
    for counted in costs.values():
        assert counted.training_step(*batch) > counted.training_step(*other) > 0
    before = costs[FULL].training_step(*batch)
    for place, (site, signature) in enumerate(list(driver.host.sites.items())[:2]):
        design = DESIGNS[signature.kind][place]
        seed_id = graft(driver, site, design)
        assert_exact(driver, costs, (batch, other))
        driver.train(2)
        assert 0 < driver.seed(seed_id).alpha < 1
        assert costs[FULL].training_step(*batch) > before
        assert_exact(driver, costs, (batch, other))
        for _ in range(4):
            driver.run_epoch()
            driver.command(Action.ADVANCE, site, seed_id)
        assert driver.stage(seed_id) is SeedStage.FOSSILIZED
        assert_exact(driver, costs, (batch, other))


def assert_exact(driver, costs, given):
    for precision, known in costs.items():
        again = Counting(driver.host, precision=precision)
        again.load_shares(known.shares())
        for batch in given:
            assert again.training_step(*batch) == _whole(driver, known, batch)
        assert again.num_whole == 0


def _whole(driver, counted, batch):
    return HostCosts(driver.host, class_loss, precision=counted._precision).training_step(*batch)


def test_counting_a_site_changes_nothing():
    batch = samples("cnn", 6)
    driver = growing(build_kind("cnn"), batch)
    costs = Counting(driver.host)
    costs.training_step(*batch)
    graft(driver, next(iter(driver.host.sites)), "norm_scale_map")
    before, training = fingerprint(driver), [m.training for m in driver.host.module.modules()]
    hooks = [len(m._forward_hooks) for m in driver.host.module.modules()]
    costs.training_step(*batch)
    assert costs.num_whole == 1
    assert_equal(fingerprint(driver), before)
    assert [m.training for m in driver.host.module.modules()] == training
    assert [len(m._forward_hooks) for m in driver.host.module.modules()] == hooks


def test_a_resumed_run_knows_the_hosts_share():
    batch = samples("mlp", 6)
    driver = growing(build_kind("mlp"), batch)
    costs = Counting(driver.host)
    costs.training_step(*batch)
    resumed = Counting(driver.host)
    resumed.load_state_dict(costs.state_dict())
    resumed.load_shares(costs.shares())
    graft(driver, next(iter(driver.host.sites)), "mlp_adapter")
    assert resumed.training_step(*batch) == costs.training_step(*batch) == _whole(driver, costs, batch)
    assert resumed.num_whole == 0


class Recomputing(nn.Module):
    """Runs its block again in the backward."""

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(checkpoint(self.block, self.first(x), use_reentrant=False))


def test_a_site_that_runs_twice_is_counted_with_the_whole_step():
    batch = (torch.randn(5, 6), torch.randint(3, (5,)))
    driver = growing(Recomputing(), batch, sites="block.2")
    costs = Counting(driver.host)
    before = fingerprint(driver)
    costs.training_step(*batch)
    assert_equal(fingerprint(driver), before)
    graft(driver, "block.2", "mlp_adapter")
    assert costs.training_step(*batch) == _whole(driver, costs, batch)
    assert costs.num_whole == 2


def test_a_host_of_which_other_parts_train_is_counted_again():
    batch = samples("mlp", 6)
    driver = growing(build_kind("mlp"), batch)
    costs = Counting(driver.host)
    costs.training_step(*batch)
    first = next(iter(driver.host.module.parameters()))
    first.requires_grad_(requires_grad=False)
    graft(driver, next(iter(driver.host.sites)), "mlp_adapter")
    assert costs.training_step(*batch) == _whole(driver, costs, batch)
    assert costs.num_whole == 2


def test_a_host_that_does_not_train_at_all_is_counted_whole():
    batch = samples("mlp", 6)
    driver = growing(build_kind("mlp").requires_grad_(requires_grad=False), batch)
    driver.host.module.head.requires_grad_()
    costs = Counting(driver.host)
    costs.training_step(*batch)
    graft(driver, next(iter(driver.host.sites)), "mlp_adapter")
    assert costs.training_step(*batch) == _whole(driver, costs, batch)
    assert costs.num_whole == 2
