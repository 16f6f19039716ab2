"""Kernels on their way in: verified, rebuilt, warmed up, and never at the host's cost."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kasmina_support import KEY, PUBLIC, Driver, Shelf, container, order, random_ir, wrapped
from torch import nn

from esper.config import KasminaConfig
from esper.kasmina.cache import KernelCache
from esper.kasmina.loader import KernelLoader
from esper.kasmina.neighbour import copy_neighbours, has_neighbours
from esper.leyline import (
    Action,
    BlueprintIR,
    IllegalTransitionError,
    KernelRejectedError,
    Node,
    NotFoundError,
    SeedStage,
    SiteKind,
    SiteSignature,
    TamperedError,
    UnavailableError,
)
from esper.leyline.container import kernel_id_of, unpack
from esper.leyline.lower import lower
from esper.urza.library import load_library

CPU = torch.device("cpu")
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=8)
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


def loader(shelf, max_bytes=1 << 20):
    return KernelLoader(shelf, PUBLIC, KernelCache(max_bytes))


def test_a_kernel_arrives_with_its_own_weights_and_arithmetic():
    shelf = Shelf()
    kernel_id = shelf.put(random_ir(), SITE, seed=5)
    loaded = loader(shelf).load(kernel_id, SITE, CPU)
    weights = unpack(shelf.containers[kernel_id], KEY.public_key()).weights
    h = torch.randn(3, 8)
    expected = h @ torch.from_numpy(np.array(weights["lin.weight"])).T + torch.from_numpy(np.array(weights["lin.bias"]))
    assert torch.allclose(loaded.module(h), expected, atol=1e-6)
    assert loaded.facts.kernel_id == kernel_id
    assert all(p.grad is None for p in loaded.module.parameters())


def test_loading_draws_no_random_numbers():
    shelf = Shelf()
    kernel_ids = [shelf.put(name, SITE) for name in ("mlp_adapter", "gated_mlp")]
    before = torch.get_rng_state()
    for kernel_id in kernel_ids:
        loader(shelf).load(kernel_id, SITE, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_tampered_with_is_refused():
    shelf = Shelf()
    kernel_id = shelf.put("mlp_adapter", SITE)
    good = shelf.containers[kernel_id]
    shelf.containers[kernel_id] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(TamperedError, match="another hash"):
        loader(shelf).load(kernel_id, SITE, CPU)
    foreign = container(random_ir(), SITE, key=STRANGER)
    shelf.containers[kernel_id_of(foreign)] = foreign
    with pytest.raises(TamperedError, match="signature"):
        loader(shelf).load(kernel_id_of(foreign), SITE, CPU)


def test_a_kernel_for_another_site_is_refused():
    shelf = Shelf()
    kernel_id = shelf.put("mlp_adapter", SITE.model_copy(update={"channels": 4}))
    with pytest.raises(KernelRejectedError, match="made for vector-4"):
        loader(shelf).load(kernel_id, SITE, CPU)


def test_a_kernel_that_is_not_finite_is_refused():
    shelf = Shelf()
    # 1000^15 is more than a float32 holds
    names = ["h", *(f"n{i}" for i in range(15))]
    nodes = tuple(
        Node(id=name, op="scale", inputs=(above,), params={"value": 1000.0}) for above, name in pairwise(names)
    )
    hot = BlueprintIR(fit=(SiteKind.VECTOR,), nodes=nodes, output=names[-1])
    kernel_id = shelf.put(hot, SITE)
    with pytest.raises(KernelRejectedError, match="not finite"):
        loader(shelf).load(kernel_id, SITE, CPU)


def test_a_second_request_is_served_from_the_cache():
    shelf = Shelf()
    kernel_id = shelf.put("mlp_adapter", SITE)
    cache = KernelCache(1 << 20)
    loads = KernelLoader(shelf, PUBLIC, cache)
    first, second = loads.load(kernel_id, SITE, CPU), loads.load(kernel_id, SITE, CPU)
    assert shelf.fetched == [kernel_id]
    assert (cache.hits, cache.misses, cache.hit_rate) == (1, 1, 0.5)
    assert first.module is not second.module, "two seeds never share weights"


def test_the_cache_drops_what_was_used_longest_ago():
    shelf = Shelf()
    ids = [shelf.put(random_ir(), SITE, seed=n) for n in range(3)]
    size = len(shelf.containers[ids[0]])
    cache = KernelCache(2 * size + size // 2)
    loads = KernelLoader(shelf, PUBLIC, cache)
    for kernel_id in (ids[0], ids[1], ids[0], ids[2]):
        loads.load(kernel_id, SITE, CPU)
    assert [kernel_id in cache for kernel_id in ids] == [True, False, True]
    assert len(cache) == 2
    assert cache.num_bytes == 2 * size
    assert KernelCache(10).hit_rate is None


def test_a_kernel_larger_than_the_cache_is_used_and_not_kept():
    shelf = Shelf()
    cache = KernelCache(10)
    KernelLoader(shelf, PUBLIC, cache).load(shelf.put(random_ir(), SITE), SITE, CPU)
    assert len(cache) == 0


# ---------------------------------------------------------------- the host's side


class Gate(Shelf):
    """A hub that answers only once it is opened."""

    def __init__(self):
        super().__init__()
        self.opened = threading.Event()

    def fetch(self, kernel_id):
        assert self.opened.wait(30)
        return super().fetch(kernel_id)


def await_kernel(driver, seed_id="s0"):
    """Steps until the loader's result has been taken in."""
    futures = [load.future for load in driver.host._life.arrivals._loading.values()]
    for future in futures:
        future.exception(timeout=30)
    driver.train(1)


def test_steps_go_on_while_a_kernel_loads_in_the_background():
    hub = Gate()
    host = wrapped("mlp", hub=hub, wait=False)
    driver = Driver("mlp", host)
    kernel_id = hub.put("mlp_adapter", host.sites["1"])
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id)
    driver.train(3)
    assert driver.stage() is SeedStage.GERMINATED
    assert driver.command(Action.ADVANCE, "1", "s0").events[0].refused
    assert not any(k.startswith("_esper.") for k in host.state_dict())
    hub.opened.set()
    await_kernel(driver)
    assert driver.seed().num_parameters > 0
    assert not driver.command(Action.ADVANCE, "1", "s0").events[0].refused
    assert driver.stage() is SeedStage.TRAINING
    host.close()


@pytest.mark.parametrize("wait", [True, False])
def test_a_refused_kernel_cancels_the_seed_with_the_reason(wait):
    hub = Shelf()
    host = wrapped("mlp", hub=hub, wait=wait)
    driver = Driver("mlp", host)
    foreign = container(random_ir(), host.sites["1"], key=STRANGER)
    hub.containers[kernel_id_of(foreign)] = foreign
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id_of(foreign))
    if not wait:
        await_kernel(driver)
    assert [e.to_stage for e in driver.events] == [SeedStage.GERMINATED, SeedStage.CANCELLED]
    assert "signature" in driver.events[-1].reason
    assert driver.events[-1].run_id == "run"
    assert not any(k.startswith("_esper.") for k in host.state_dict())
    driver.close().train(1)
    assert driver.stage() is SeedStage.DORMANT
    host.close()


def test_where_kernels_are_waited_for_check_names_the_refusal_and_a_silent_hub_is_raised():
    hub = Shelf()
    host = wrapped("mlp", hub=hub, wait=True)
    assert "no kernel" in host.check(order(Action.GERMINATE, "1", "s0", kernel_id="f" * 64))
    assert host.check(order(Action.GERMINATE, "1", "s0", kernel_id=hub.put("mlp_adapter", host.sites["1"]))) is None

    def silent(_kernel_id):
        raise UnavailableError("Urza did not answer")

    hub.fetch = silent
    command = order(Action.GERMINATE, "1", "s0", kernel_id="e" * 64)
    with pytest.raises(UnavailableError):
        host.check(command)
    with pytest.raises(UnavailableError):
        host.apply(command, run_id="r", epoch=0, step=0)
    assert host.seeds()[0].stage is SeedStage.DORMANT


def test_without_a_hub_nothing_germinates():
    host = wrapped("mlp")
    command = order(Action.GERMINATE, "1", "s0", kernel_id="f" * 64)
    assert "no asset hub" in host.check(command)
    (event,) = host.apply(command, run_id="r", epoch=0, step=0).events
    assert event.refused
    with pytest.raises(NotFoundError, match="attach"):
        host.load_kernel("1", "s0", "f" * 64)


def test_load_kernel_puts_a_verified_kernel_into_a_seed():
    hub = Shelf()
    host = wrapped("mlp", hub=hub, wait=False)
    kernel_id = hub.put(random_ir(), host.sites["1"], seed=3)
    view = host.load_kernel("1", "s0", kernel_id)
    assert (view.stage, view.kernel_id, view.num_parameters) == (SeedStage.GERMINATED, kernel_id, 72)
    expected = torch.from_numpy(np.array(unpack(hub.containers[kernel_id], KEY.public_key()).weights["lin.weight"]))
    assert torch.equal(host.state_dict()["_esper.1.s0.lin.weight"], expected)
    with pytest.raises(IllegalTransitionError):
        host.load_kernel("1", "s0", kernel_id)
    with pytest.raises(NotFoundError):
        host.load_kernel("3", "s1", "f" * 64)
    assert next(v for v in host.seeds() if v.seed_id == "s1").stage is SeedStage.DORMANT
    (event,) = host.prepare(0, epoch=0, steps_per_epoch=1, observe=False).events
    assert event.to_stage is SeedStage.GERMINATED


def test_a_cull_while_the_kernel_loads_is_the_end_of_it():
    hub = Gate()
    host = wrapped("mlp", hub=hub, wait=False, config=KasminaConfig(embargo_epochs=0))
    driver = Driver("mlp", host)
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=hub.put("mlp_adapter", host.sites["1"]))
    driver.command(Action.CULL, "1", "s0")
    hub.opened.set()
    host.close()
    driver.train(2)
    assert driver.stage() is SeedStage.CULLED
    assert not any(k.startswith("_esper.") for k in host.state_dict())


# ---------------------------------------------------------------- neighbours


def test_a_stack_starts_from_the_neighbouring_layer():
    hub = Shelf()
    host = wrapped("mlp", hub=hub)
    # site 3 follows layer 2 (8 to 8): layer 0 has another shape, layer 4 lies behind
    host.load_kernel("3", "s1", hub.put("linear_stack", host.sites["3"]))
    state = host.state_dict()
    assert torch.equal(state["_esper.3.s1.copied.weight"], state["2.weight"])
    assert torch.equal(state["_esper.3.s1.copied.bias"], state["2.bias"])
    assert not state["_esper.3.s1.last.weight"].any()


def test_layers_inside_the_site_come_before_those_around_it():
    torch.manual_seed(0)
    ir = load_library()["linear_stack"].ir
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU()), nn.Linear(8, 8))
    kernel = lower(ir, SITE)
    copy_neighbours(net, "1", kernel, ir)
    assert torch.equal(kernel.get_parameter("copied.weight"), net[1][0].weight)
    assert not kernel.get_parameter("copied.bias").any(), "the neighbour has none"


def test_without_a_neighbour_the_kernel_is_refused():
    hub = Shelf()
    torch.manual_seed(0)
    host = wrapped("cnn", hub=hub)
    driver = Driver("cnn", host)
    # stem.2 is 4 channels wide; the one 4-to-4 convolution is there
    kernel_id = hub.put("conv_stack", host.sites["stem.2"])
    driver.command(Action.GERMINATE, "stem.2", "s0", kernel_id=kernel_id)
    state = host.state_dict()
    assert torch.equal(state["_esper.stem/2.s0.copied.weight"], state["conv.weight"])
    ir = load_library()["linear_stack"].ir
    with pytest.raises(KernelRejectedError, match="no Linear of shape"):
        copy_neighbours(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), "1", lower(ir, SITE), ir)


def test_a_host_says_beforehand_whether_it_has_the_layers_that_a_design_copies():
    host, designs = wrapped("mlp"), load_library()
    assert host.has_neighbours("3", designs["linear_stack"].ir)
    assert not has_neighbours(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), "1", designs["linear_stack"].ir, SITE)
    assert host.has_neighbours("3", designs["mlp_adapter"].ir), "it copies nothing"


def test_a_kernel_that_was_checked_is_not_fetched_again_though_no_cache_can_hold_it():
    """Between a rank's word that it has the kernel and the graft, the hub may fall silent."""
    shelf = Shelf()
    host = wrapped("mlp")
    host.cache = KernelCache(10)
    host.attach(shelf, PUBLIC, wait=True)
    kernel_id = shelf.put("mlp_adapter", host.sites["1"])
    command = order(Action.GERMINATE, "1", "s0", kernel_id=kernel_id)
    assert host.check(command) is None
    del shelf.containers[kernel_id]
    host.apply(command, run_id="r", epoch=0, step=0)
    assert host.seeds()[0].stage is SeedStage.GERMINATED
    assert shelf.fetched == [kernel_id]
    assert len(host.cache) == 0


def test_a_kernel_that_was_checked_and_not_wanted_is_let_go_at_the_next_step():
    shelf = Shelf()
    host = wrapped("mlp")
    host.cache = KernelCache(10)
    host.attach(shelf, PUBLIC, wait=True)
    command = order(Action.GERMINATE, "1", "s0", kernel_id=shelf.put("mlp_adapter", host.sites["1"]))
    host.check(command)
    host.prepare(0, epoch=0, steps_per_epoch=4, observe=False)
    host.apply(command, run_id="r", epoch=0, step=0)
    assert len(shelf.fetched) == 2
