"""A host that its owner compiled: regions between sites are compiled once, and growth never compiles any again.

The backend hands the captured graph back as it is, so no compiler runs here.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo as dynamo
from identity import build_kind, samples
from kasmina_support import PUBLIC, Driver, Shelf, assert_equal, class_loss, order
from torch._dynamo.utils import counters

from esper.kasmina import export, wrap
from esper.leyline import Action, ConflictError, SeedStage

# dynamo itself looks at the gradient of what enters a graph from another
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
KINDS = {"cnn": "stages.0.1", "gpt": "blocks.1"}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


class Graphs:
    """A backend that compiles nothing and keeps the names of what it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, _inputs):
        self.seen.append([node.name for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


def grown_driver(kind, *, compiled):
    """A driver that has been through a whole life of a seed; and the backend, with counts at each stage."""
    model, graphs = build_kind(kind), Graphs()
    if compiled:
        model.compile(backend=graphs)
    batch = samples(kind, 4)
    host = wrap(model, example=(batch[0],), causal=kind == "gpt")
    assert not graphs.seen, "the probe runs eagerly"
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host, observe_every=3)
    driver.batches = [batch]
    site = KINDS[kind]
    seed_id = next(view.seed_id for view in host.seeds() if view.site == site)
    design = "mlp_adapter" if kind == "gpt" else "residual_conv"
    torch.manual_seed(1)
    driver.train(4)
    return driver, graphs, site, seed_id, shelf.put(design, host.sites[site])


@pytest.mark.parametrize("kind", KINDS)
def test_a_graft_compiles_nothing_anew_and_grows_into_what_it_grows_into_uncompiled(kind):
    driver, graphs, site, seed_id, kernel_id = grown_driver(kind, compiled=True)
    num_graphs, frames = len(graphs.seen), dict(counters["frames"])
    assert num_graphs >= 3, "before, between and after the sites"
    assert any("conv2d" in graph or "layer_norm" in graph for graph in graphs.seen), "blocks are compiled"
    driver.to_fossil(site, kernel_id, seed_id)
    driver.train(2)
    assert len(graphs.seen) == num_graphs
    assert dict(counters["frames"]) == frames
    assert not counters["recompiles"]
    eager, _, site, seed_id, kernel_id = grown_driver(kind, compiled=False)
    eager.to_fossil(site, kernel_id, seed_id)
    eager.train(2)
    state = dict(eager.host.state_dict())
    assert any(key.startswith("_esper.") for key in state)
    assert_equal(dict(driver.host.state_dict()), state)


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_that_is_compiled_alone_is_seen(where):
    """Else the hooks of what is grafted later would silently never run."""
    model, graphs = build_kind("gpt"), Graphs()
    block, kind = model.blocks[1], type(model.blocks[1])
    if where == "instance":
        model.forward = torch.compile(model.forward, backend=graphs)
    else:
        compiled = type("Compiled", (kind,), {"forward": torch.compile(kind.forward, backend=graphs)})
        block.__class__ = compiled
    batch = samples("gpt", 4)
    host = wrap(model, example=(batch[0],), causal=True)
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host)
    driver.batches = [batch]
    driver.train(1)
    num_graphs = len(graphs.seen)
    assert num_graphs >= 1
    seed_id = next(view.seed_id for view in host.seeds() if view.site == "blocks.1")
    driver.to_fossil("blocks.1", shelf.put("mlp_adapter", host.sites["blocks.1"]), seed_id)
    assert len(graphs.seen) == num_graphs
    with torch.no_grad():
        grown = host(batch[0])
        for name, parameter in model.named_parameters():
            if name.startswith("_esper."):
                parameter.zero_()
        assert not torch.equal(host(batch[0]), grown), "the kernel is on the live path"


def test_a_forward_that_is_kept_from_compilers_is_not_a_compiled_one():
    model = build_kind("gpt")
    model.forward = torch.compiler.disable(model.forward)
    wrap(model, example=(samples("gpt", 4)[0],), causal=True)
    assert not any(layer.is_fixed for layer in model.get_submodule("_esper").children())


def test_a_copy_and_an_export_leave_the_compiled_host_alone():
    driver, _, site, seed_id, kernel_id = grown_driver("cnn", compiled=True)
    driver.to_fossil(site, kernel_id, seed_id)
    x = driver.batches[0][0]
    driver.host.eval()
    with torch.no_grad():
        expected = driver.host(x)
        twin = copy.deepcopy(driver.host.module)
        for name, parameter in twin.named_parameters():
            if name.startswith("_esper."):
                parameter.zero_()
        assert not torch.equal(twin(x), expected), "the copy has kernels of its own"
        assert torch.equal(driver.host(x), expected)
        assert torch.equal(export(driver.host)(x), expected)


def test_compiling_after_wrapping_is_refused():
    model = build_kind("gpt")
    x, _ = samples("gpt", 4)
    host = wrap(model, example=(x,), causal=True)
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    model.compile(backend=Graphs())
    view = host.seeds()[0]
    command = order(Action.GERMINATE, view.site, view.seed_id, kernel_id=shelf.put("mlp_adapter", view.signature))
    assert "compiled after it was wrapped" in (host.check(command) or "")
    (event,) = host.apply(command, run_id="r", epoch=0, step=0).events
    assert event.refused
    assert host.seeds()[0].stage is SeedStage.DORMANT


def test_the_wrapper_that_torch_compile_returns_is_refused_with_the_remedy():
    x, _ = samples("gpt", 4)
    with pytest.raises(ConflictError, match=r"model\.compile"):
        wrap(torch.compile(build_kind("gpt"), backend=Graphs()), example=(x,))


def test_a_part_that_is_compiled_is_enough():
    model, graphs = build_kind("gpt"), Graphs()
    model.blocks[1].compile(backend=graphs)
    x, y = samples("gpt", 4)
    host = wrap(model, example=(x,), causal=True)
    assert class_loss(host(x), y).isfinite()
    assert len(graphs.seen) == 1
    fixed = [layer.site for layer in model.get_submodule("_esper").children() if layer.is_fixed]
    assert fixed == ["blocks.1"]
