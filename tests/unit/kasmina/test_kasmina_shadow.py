"""A seed in TRAINING leaves the host bit-identical to a run without it, and its kernel learns."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from kasmina_support import (
    DESIGNS,
    HOSTS,
    PUBLIC,
    SITES,
    Driver,
    Shelf,
    assert_equal,
    batches,
    build,
    class_loss,
    fingerprint,
    wrapped,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina import wrap
from esper.leyline import SeedStage, SiteError


def plain_run(name, steps):
    """The user's own loop on the user's own model: Esper is not there."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    for x, y in batches(name, 64)[:steps]:
        optimizer.zero_grad()
        class_loss(model(x), y).backward()
        optimizer.step()
    found = {n: t.clone() for n, t in model.state_dict().items()}
    found |= {f"grad {n}": p.grad.clone() for n, p in model.named_parameters()}
    for index, state in enumerate(optimizer.state_dict()["state"].values()):
        found |= {f"optimizer {index} {k}": t.clone() for k, t in state.items()}
    return found | {"rng": torch.get_rng_state()}


@pytest.mark.parametrize("name", HOSTS)
def test_fifty_steps_with_shadows_leave_the_host_as_without_seeds(name):
    reference = plain_run(name, 50)
    shelf = Shelf()
    host = wrapped(name, hub=shelf)
    driver = Driver(name, host, observe_every=3)
    site = SITES[name]
    kernel_id = shelf.put(DESIGNS[name], driver.signature(site))
    seed_id = next(v.seed_id for v in host.seeds() if v.site == site)
    driver.to_training(site, kernel_id, seed_id)
    before = {k: t.clone() for k, t in host.state_dict().items() if k.startswith("_esper.")}
    torch.manual_seed(1)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - hosts may use it
    driver.train(50)
    assert_equal(fingerprint(driver), reference)
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()  # noqa: NPY002
    after = {k: t for k, t in host.state_dict().items() if k.startswith("_esper.")}
    assert any(not torch.equal(after[k], before[k]) for k in before), "the kernel did not train"
    assert all(not p.requires_grad for n, p in host.module.named_parameters() if n.startswith("_esper."))


def test_the_kernel_learns_what_the_host_lacks():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    driver = Driver("mlp", host, lr=1e-9)
    driver.batches = driver.batches[:1]
    driver.to_training("1", shelf.put("mlp_adapter", driver.signature("1")))
    x, y = driver.batches[0]
    first = host.train_shadows((x,), lambda out: class_loss(out, y)).losses["s0"]
    driver.train(150)
    last = host.train_shadows((x,), lambda out: class_loss(out, y)).losses["s0"]
    assert first == pytest.approx(class_loss(host(x), y).item(), rel=1e-3), "zero at birth"
    assert last < 0.9 * first
    with torch.no_grad(), host.shadowed("s0"):
        assert float(class_loss(host(x), y)) == pytest.approx(last, rel=0.05)


def test_each_candidate_has_its_own_replay():
    """Two seeds in TRAINING: each sees the host without the other, so it learns what it learns alone."""

    def learned(sites):
        shelf = Shelf()
        host = wrapped("mlp", hub=shelf)
        driver = Driver("mlp", host)
        for seed_id, site in (("s0", "1"), ("s1", "3")):
            if site in sites:
                driver.to_training(site, shelf.put("mlp_adapter", driver.signature(site)), seed_id)
        torch.manual_seed(1)
        driver.train(10)
        return {k: t for k, t in host.state_dict().items() if k.startswith("_esper.1.")}

    alone, together = learned({"1"}), learned({"1", "3"})
    assert alone
    assert_equal(alone, together)


def test_gradients_are_reduced_over_ranks_before_the_update():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    driver = Driver("mlp", host).to_training("1", shelf.put("mlp_adapter", host.sites["1"]))
    x, y = driver.batches[0]
    before = {k: t.clone() for k, t in host.state_dict().items() if k.startswith("_esper.")}
    seen = []

    def all_reduce(gradients):
        seen.append([g.shape for g in gradients])
        for gradient in gradients:
            gradient.zero_()

    host.train_shadows((x,), lambda out: class_loss(out, y), all_reduce=all_reduce)
    after = {k: t for k, t in host.state_dict().items() if k.startswith("_esper.")}
    assert len(seen) == 1
    # a zero gradient moves nothing but the weight decay
    assert all(torch.allclose(after[k], before[k], atol=1e-4) for k in before)


def test_a_gradient_that_is_not_finite_is_left_out_and_asks_for_removal():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    driver = Driver("mlp", host).to_training("1", shelf.put("mlp_adapter", host.sites["1"]))
    x, _ = driver.batches[0]
    before = {k: t.clone() for k, t in host.state_dict().items()}
    step = host.train_shadows((x,), lambda out: out.sum() * float("inf"))
    assert step.losses == {}
    assert_equal(dict(host.state_dict()), before)
    report = host.close_epoch(run_id="r", epoch=0, step=1, val_loss=1.0)[0]
    assert report.seeds[0].should_cull
    assert "not finite" in report.seeds[0].gate


def test_a_loss_that_ignores_the_site_is_an_error():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.unused = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            self.unused(x)
            return self.head(self.used(x).relu())

    shelf = Shelf()
    host = wrap(TwoHeads(), example=(torch.randn(2, 4),), sites=["unused.1"])
    from kasmina_support import PUBLIC, order

    from esper.leyline import Action

    host.attach(shelf, PUBLIC, wait=True)
    host.load_kernel("unused.1", "s0", shelf.put("mlp_adapter", host.sites["unused.1"]))
    host.apply(order(Action.ADVANCE, "unused.1", "s0"), run_id="r", epoch=0, step=0)
    assert host.seeds()[0].stage is SeedStage.TRAINING
    with pytest.raises(SiteError, match="does not depend"):
        host.train_shadows((torch.randn(2, 4),), lambda out: out.sum())


class Recomputing(nn.Module):
    """Runs its block again in the backward (`torch.utils.checkpoint`), as large models do."""

    def __init__(self, *, recompute):
        super().__init__()
        self.first, self.head, self.recompute = nn.Linear(6, 8), nn.Linear(8, 3), recompute
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())

    def forward(self, x):
        h = self.first(x)
        return self.head(checkpoint(self.block, h, use_reentrant=False) if self.recompute else self.block(h))


def test_a_host_that_recomputes_activations_grows_as_one_that_keeps_them():
    """Its sites run again in the backward, of the host and of each replay; torch ends that run by an exception."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        host = wrap(Recomputing(recompute=recompute), example=(batches("mlp", 1)[0][0],), sites="block.3")
        shelf = Shelf()
        host.attach(shelf, PUBLIC, wait=True)
        driver = Driver("mlp", host)
        driver.to_fossil("block.3", shelf.put("mlp_adapter", driver.signature("block.3")))
        found.append({k: t for k, t in host.state_dict().items() if "running" not in k and "batches" not in k})
    assert_equal(*found)  # but for running statistics: torch's recomputation adds to them too


def test_a_shadow_leaves_a_host_alone_that_recomputes_activations():
    host = wrap(Recomputing(recompute=True), example=(batches("mlp", 1)[0][0],), sites="block.3")
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host).to_training("block.3", shelf.put("mlp_adapter", host.sites["block.3"]))
    driver.train(1)
    before = fingerprint(driver)
    x, y = driver.batches[0]
    assert host.train_shadows((x,), lambda out: class_loss(out, y)).losses
    assert_equal(fingerprint(driver), before)
