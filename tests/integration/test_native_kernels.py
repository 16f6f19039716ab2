"""Native code from compilation to a host that trains on it. One real kernel is built for all of these tests."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kasmina_support import DESIGNS, KEY, PUBLIC, SITES, Driver, Shelf, batches, class_loss, wrapped

from actors.tezzeret import make_builder
from esper.config import TezzeretConfig
from esper.kasmina import export
from esper.kasmina.cache import KernelCache
from esper.kasmina.loader import KernelLoader
from esper.kasmina.native import open_checked
from esper.leyline import (
    Blueprint,
    BlueprintStatus,
    CompiledKernelArtifact,
    CompileJob,
    Fault,
    KernelRejectedError,
    Pipeline,
    SeedStage,
    SiteKind,
    SiteSignature,
)
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import kernel_id_of, pack, unpack
from esper.leyline.lower import lower
from esper.leyline.native import FASTER, NativeFacts, NativeVerdict, Rung
from esper.leyline.runtime import NativeKernel, NativeModule, open_native
from esper.tezzeret import wire
from esper.tezzeret.compile import Unsigned, benchmark, build, sign
from esper.tezzeret.fingerprint import target_fingerprint
from esper.tezzeret.native import compile_native
from esper.tezzeret.process import CompilerProcess
from esper.tezzeret.worker import Compiled, work_once
from esper.tolaria.costs import HostCosts
from esper.urabrask.gauntlet import examine
from esper.urabrask.native import examine_native
from esper.urza.library import load_library
from esper.urza.memory import MemoryHub

CPU = torch.device("cpu")
DESIGN = DESIGNS["mlp"]
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=8)
IR = load_library()[DESIGN].ir

pytestmark = pytest.mark.timeout(900)  # a C++ compiler runs, on a machine that others may use


@dataclass
class Built:
    """One compilation: its result, what Urabrask saw, and what it said."""

    unsigned: Unsigned
    artifact: CompiledKernelArtifact
    container: bytes
    kernel: NativeKernel
    verdict: NativeVerdict

    @property
    def facts(self) -> NativeFacts:
        return self.kernel.facts

    def changed(self, payload: dict[str, bytes] | None = None, **facts) -> bytes:
        """The same kernel, signed anew with other facts or another payload."""
        manifest = self.unsigned.manifest
        native = manifest.native.model_copy(update=facts)
        members = dict(self.unsigned.payload) | (payload or {})
        return pack(manifest.model_copy(update={"native": native}), self.unsigned.weights, KEY, payload=members)


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    """Without a C++ compiler nothing here can be tested; where CI runs, `.ci/packages` has installed one."""
    missing = [program for program in (os.environ.get("CXX", "g++"), "strip") if shutil.which(program) is None]
    if missing:
        words = f"native code cannot be compiled here: no {' and no '.join(missing)}; see .ci/packages"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(words)


def make(site: SiteSignature) -> Built:
    """Compiles the design for a site, as a worker's compiler does."""
    seen: list[tuple[NativeKernel, NativeVerdict]] = []

    def watched(module, signature, kernel):
        verdict = examine_native(module, signature, kernel)
        seen.append((kernel, verdict))
        # how fast it is here and now decides no test
        return verdict.model_copy(
            update={"timing": verdict.timing and verdict.timing.model_copy(update={"ratio": 0.8})}
        )

    blueprint = Blueprint(blueprint_id="b1", name=DESIGN, ir=IR, ir_hash=canonical_hash(IR), created_at=1.0)
    job = CompileJob(
        job_id="j1", blueprint=blueprint, signature=site, pipeline=Pipeline.OPTIMIZED, worker="w1", deadline=0.0
    )
    unsigned = build(job, fingerprint=target_fingerprint(site.device), examine=examine, examine_native=watched)
    unsigned = pickle.loads(pickle.dumps(unsigned))  # as it comes from a child process
    artifact, container = sign(unsigned, KEY)
    assert seen, f"no native code was examined: {unsigned.report.checks[-1].detail}"
    return Built(unsigned, artifact, container, *seen[0])


@pytest.fixture(scope="module")
def built() -> Built:
    return make(SITE)


@pytest.fixture(scope="module")
def built_for_gpu() -> Built:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return make(SITE.model_copy(update={"device": "cuda"}))


def test_what_was_built_is_right_and_says_how_fast_it_is(built: Built):
    checks = {check.name: check for check in built.verdict.checks}
    assert checks["native.output"].passed, checks["native.output"]
    assert checks["native.gradient"].passed, checks["native.gradient"]
    assert {"native.stable_large", "native.stable_nan", "native.deterministic"} <= checks.keys()
    assert all(check.passed for check in checks.values()), checks
    assert built.artifact.report.figures["native_saved_bytes"] > 0
    assert built.unsigned.manifest.report.figures["eager_saved_bytes"] > 0
    assert built.verdict.tolerance < 1e-5
    assert built.verdict.timing is not None
    assert built.verdict.timing.native_ms > 0
    assert built.artifact.optimization_level == 1
    assert built.artifact.report.checks[-1].name == "native.speed"
    assert built.unsigned.manifest.native.timing.ratio == 0.8
    result = benchmark(built.artifact, built.unsigned.timing)
    assert (result.kernel_id, result.speed) == (built.artifact.kernel_id, 1.25)
    assert {"forward_native_ratio", "backward_native_ratio", "forward_native_ratio_spread"} <= result.figures.keys()
    assert "backward" in built.artifact.report.checks[-1].detail


def test_gradients_are_right_where_the_output_is_a_view_and_an_op_is_kept_whole():
    """Both were wrong once: the backward took its gradient, and group norm its input, for strides they had not."""
    site = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(4, 4))
    module = lower(load_library()["attention_map"].ir, site)
    code = compile_native(module, site)
    verdict = examine_native(module, site, open_native("view", code.facts, code.payload))
    checks = {check.name: check for check in verdict.checks}
    assert checks["native.output"].passed, checks["native.output"]
    assert checks["native.gradient"].passed, checks["native.gradient"]


def test_a_worker_makes_it_in_a_process_of_its_own_and_files_the_figures():
    hub = MemoryHub()
    blueprint = hub.submit_blueprint(IR, name=DESIGN, targets=[SITE], pipelines=[Pipeline.OPTIMIZED])
    # else it stands still for three quarters of the time in which any test, or program, of this machine trains
    compiler = make_builder(TezzeretConfig(yields="never"))
    try:
        outcome = work_once(hub, compiler, worker="w1", private_key=KEY)
    finally:
        compiler.close()
    assert isinstance(outcome, Compiled), outcome
    assert hub.blueprint(blueprint.blueprint_id).status is BlueprintStatus.VALIDATED
    (kernel,) = hub.kernels(signature=SITE, pipeline=Pipeline.OPTIMIZED)
    entry = hub.kernel_entry(kernel.kernel_id)
    (result,) = entry.benchmarks
    # here it may be faster or not: either way the figure is there, and the level says what became of it
    assert (kernel.optimization_level == 1) is (result.figures["native_ratio"] < FASTER)
    assert (result.speed == 1.0) is (kernel.optimization_level == 0)
    loaded = KernelLoader(hub, PUBLIC, KernelCache(1 << 24)).load(kernel.kernel_id, SITE, CPU)
    assert (loaded.native is not None) is (kernel.optimization_level == 1), loaded.no_native


def test_native_code_that_crashes_under_examination_ends_its_process_and_is_told_of(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    blueprint = Blueprint(blueprint_id="b1", name=DESIGN, ir=IR, ir_hash=canonical_hash(IR), created_at=1.0)
    job = CompileJob(
        job_id="j1", blueprint=blueprint, signature=SITE, pipeline=Pipeline.OPTIMIZED, worker="w1", deadline=0.0
    )
    compiler = CompilerProcess("esper.urabrask.gauntlet:examine", examine_native="examiners:examine_crashing")
    try:
        verdict = compiler.build(job, lambda: None)
    finally:
        compiler.close()
    assert isinstance(verdict, wire.Broken), verdict
    assert verdict.fault is Fault.DEATH
    assert "SIGSEGV" in verdict.reason
    assert "met a NaN" in verdict.log


# ---------------------------------------------------------------- the runtime


@pytest.fixture
def module() -> torch.nn.Module:
    module = lower(IR, SITE).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():  # else the last layer's zeros hide the others
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    return module


def values(run, module, h):
    y = run(h)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [h, *module.parameters()])]


def far(one, other):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 33])
def test_output_and_every_gradient_are_those_of_the_module(built: Built, module, batch: int):
    native = NativeModule(built.kernel, module)
    h = torch.randn(batch, 8, requires_grad=True)
    strided = h.detach().t().contiguous().t().requires_grad_()
    assert strided.is_contiguous() is (batch == 1)
    expected = values(module, module, h)
    for given in (h, strided):
        assert far(values(native, module, given), expected) < 1e-4
        assert native.fallback is None


def test_functional_call_reaches_native_code(built: Built, module):
    native = NativeModule(built.kernel, module)
    other = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    h = torch.randn(4, 8)
    with torch.no_grad():
        holder = Holder(module, native)
        y = torch.func.functional_call(holder, {f"module.{name}": tensor for name, tensor in other.items()}, (h,))
        assert not y.any()
        assert native(h).any()


class Holder(torch.nn.Module):
    def __init__(self, module, native):
        super().__init__()
        self.module, self.native = module, native

    def forward(self, h):
        return self.native(h)


def test_a_write_into_what_was_saved_is_found_out(built: Built, module):
    leaf = torch.randn(4, 8, requires_grad=True)
    h = leaf * 1.0
    y = NativeModule(built.kernel, module)(h)
    h.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace operation"):
        y.sum().backward()


def test_what_the_code_does_not_compute_runs_from_the_ir(built: Built, module):
    native = NativeModule(built.kernel, module)
    h = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(native(h), module(h))
    assert "autocast" in native.conflict
    assert native(h) is not None
    assert native.fallback is None
    wide = copy.deepcopy(module).double()
    native_wide = NativeModule(built.kernel, wide)
    assert torch.equal(native_wide(h.double()), wide(h.double()))
    assert "float64" in native_wide.conflict
    narrow = NativeKernel("n", built.facts.model_copy(update={"min_batch": 8}), None, None)
    small = NativeModule(narrow, module)
    assert torch.equal(small(h), module(h))
    assert "batch of 4" in small.exception
    assert small.conflict is None


def test_copies_share_the_code_and_pickling_is_refused(built: Built):
    assert copy.deepcopy(built.kernel) is built.kernel
    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(built.kernel)


# ---------------------------------------------------------------- on a GPU


def test_on_a_gpu_what_was_built_is_right(built_for_gpu: Built):
    checks = {check.name: check for check in built_for_gpu.verdict.checks}
    assert all(check.passed for check in checks.values()), checks
    assert {"native.output", "native.gradient", "native.stable_nan", "native.deterministic"} <= checks.keys()
    assert built_for_gpu.facts.target.device == "cuda"
    assert built_for_gpu.artifact.optimization_level == 1
    assert built_for_gpu.verdict.timing.native_ms > 0


@pytest.mark.parametrize("batch", [1, 3, 33])
def test_on_a_gpu_output_and_every_gradient_are_those_of_the_module(built_for_gpu: Built, module, batch: int):
    module = module.cuda()
    native = NativeModule(built_for_gpu.kernel, module)
    h = torch.randn(batch, 8, device="cuda", requires_grad=True)
    strided = h.detach().t().contiguous().t().requires_grad_()
    expected = values(module, module, h)
    for given in (h, strided):
        assert far(values(native, module, given), expected) < 1e-4
        assert native.conflict is None
        assert batch < built_for_gpu.facts.min_batch or native.fallback is None


def test_on_a_gpu_the_ladder_gives_native_code_and_on_a_cpu_the_ir(built_for_gpu: Built):
    site = SITE.model_copy(update={"device": "cuda"})
    shelf = Shelf()
    shelf.containers[built_for_gpu.artifact.kernel_id] = built_for_gpu.container
    loader = KernelLoader(shelf, PUBLIC, KernelCache(1 << 24))
    found = loader.load(built_for_gpu.artifact.kernel_id, site, torch.device("cuda"))
    assert found.native is not None, found.no_native
    with pytest.raises(KernelRejectedError, match="the host computes on cpu"):
        open_checked(unpack(built_for_gpu.container, PUBLIC), lambda: lower(IR, SITE), CPU)


# ---------------------------------------------------------------- the ladder


def loaded(data: bytes, **settings):
    shelf = Shelf()
    shelf.containers[kernel_id_of(data)] = data
    loader = KernelLoader(shelf, PUBLIC, KernelCache(1 << 24), **settings)
    return loader.load(kernel_id_of(data), SITE, CPU)


def test_a_faster_kernel_is_loaded_with_its_code(built: Built):
    result = loaded(built.container)
    assert result.native is not None
    assert result.native.name == built.artifact.kernel_id
    assert result.no_native == ""
    assert loaded(built.container).native is result.native, "opened once a process"


def test_code_that_did_well_is_not_tried_again_while_it_stays_open(built: Built, monkeypatch):
    assert loaded(built.container).native is not None
    monkeypatch.setattr("esper.kasmina.native._try", lambda *_: pytest.fail("it was tried again"))
    assert loaded(built.container).native is not None


def test_each_rung_below_has_its_reason(built: Built):
    facts = built.facts
    slow = built.unsigned.manifest.native.timing.model_copy(update={"ratio": 0.98})
    other_torch = facts.target.model_copy(update={"torch": "2.0.0"})
    other_cpu = facts.target.model_copy(update={"cpu_flags": (*facts.target.cpu_flags, "avx4096")})
    library = facts.member("forward")
    swapped = list(facts.parameters)
    first, second = (swapped.index(name) for name in ("norm.weight", "norm.bias"))
    swapped[first], swapped[second] = swapped[second], swapped[first]
    cases = {
        "0.98 of eager's time": built.changed(timing=slow),
        "unknown share": built.changed(timing=None),
        "built for torch 2.0.0": built.changed(target=other_torch),
        "lacks avx4096": built.changed(target=other_cpu),
        "does not load": built.changed({library: b"\x7fELF" + bytes(4096)}),
        "deviates from its IR": built.changed(parameters=tuple(swapped)),
        "contradicts itself": built.changed(max_batch=1, min_batch=2),
    }
    for words, data in cases.items():
        result = loaded(data)
        assert result.native is None
        assert words in result.no_native, result.no_native
        assert torch.isfinite(result.module(torch.randn(2, 8))).all()
    missing = sign(Unsigned(built.unsigned.manifest, built.unsigned.weights, {}, built.unsigned.report, 0.0), KEY)[1]
    assert "no such member" in loaded(missing).no_native
    assert "depend on" in loaded(built.container, native=False).no_native


FRESH = """
import sys, torch
from esper.kasmina.loader import build
from esper.kasmina.native import open_checked
from esper.leyline.container import unpack
from esper.leyline.runtime import NativeModule
kernel = unpack(open(sys.argv[1], "rb").read(), sys.argv[2])
module = build(kernel.manifest, kernel.weights)
native = NativeModule(open_checked(kernel, lambda: module, torch.device("cpu")), module)
native(torch.randn(4, 8)).sum().backward()
assert native.fallback is None
assert all(p.grad is not None for p in module.parameters())
print(sorted(name for name in sys.modules if name.startswith(("torch._inductor", "esper.tezzeret"))))
"""


def test_a_trainer_needs_no_compiler_for_it(built: Built, tmp_path):
    file = tmp_path / "one.kernel"
    file.write_bytes(built.container)
    command = [sys.executable, "-c", FRESH, str(file), PUBLIC.hex()]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {"PATH": str(tmp_path), "PYTHONPATH": paths}  # no g++ to be found
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]"]


# ---------------------------------------------------------------- the hot swap


def grafting(built: Built | None = None, **settings) -> tuple[Driver, Shelf]:
    """A host whose kernel is being blended in, from its IR; the shelf has native code for it."""
    shelf = Shelf()
    if built is not None:
        shelf.containers[built.artifact.kernel_id] = built.container
    host = wrapped("mlp", hub=shelf, **settings)
    driver = Driver("mlp", host)
    return driver.to_grafting(SITES["mlp"], shelf.put(DESIGN, SITE)), shelf


def awaited(driver: Driver) -> None:
    """Waits for the loads that are under way."""
    for _, _, future in list(driver.host._life.arrivals._natives._loading.values()):
        future.exception(timeout=120)


@pytest.fixture
def swapped(built: Built) -> Iterator[Driver]:
    driver, _ = grafting(built)
    driver.host.request_native("s0", built.artifact.kernel_id)
    awaited(driver)
    driver.train(1)
    yield driver
    driver.host.close()


def test_a_swap_changes_the_code_and_nothing_else(built: Built):
    driver, _ = grafting(built)
    twin, _ = grafting()
    driver.train(3), twin.train(3)
    kernel = driver.host._life.find("s0")[0].kernel(driver.host._life.find("s0")[1])
    objects = [id(p) for p in kernel.parameters()]
    driver.host.request_native("s0", built.artifact.kernel_id)
    awaited(driver)
    before = {name: tensor.clone() for name, tensor in driver.host.state_dict().items()}
    moments = copy.deepcopy(driver.optimizer.state_dict())
    change = driver.take(driver.host.prepare(driver.step, epoch=driver.epoch, steps_per_epoch=4, observe=False))
    twin.take(twin.host.prepare(twin.step, epoch=twin.epoch, steps_per_epoch=4, observe=False))
    (rung,) = change.rungs
    assert (rung.rung, rung.seed, rung.step) == (Rung.NATIVE, "s0", driver.step)
    assert "0.80 of eager's time" in rung.reason
    assert not change.path_changed
    assert driver.seed().native == built.artifact.kernel_id
    assert [id(p) for p in kernel.parameters()] == objects
    assert all(torch.equal(before[name], tensor) for name, tensor in driver.host.state_dict().items())
    after = driver.optimizer.state_dict()["state"]
    for index, state in moments["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[index][k])) for k, v in state.items())
    # one step with the same batch, gradients compared: no optimizer between the code and the figures
    x, y = driver.batches[driver.step]
    for one in (driver, twin):
        one.optimizer.zero_grad()
        class_loss(one.host(x), y).backward()
    theirs = dict(twin.host.live_parameters())
    limit = 10 * max(built.unsigned.manifest.native.tolerance, 1e-6)
    for name, parameter in driver.host.live_parameters():
        expected = theirs[name].grad
        assert float((parameter.grad - expected).abs().max()) <= limit * max(1e-3, float(expected.abs().max())), name
    native = driver.host._life.find("s0")[0].natives["s0"]
    assert native.fallback is None
    driver.train(8), twin.train(8)
    for name, tensor in twin.host.state_dict().items():
        assert torch.allclose(driver.host.state_dict()[name], tensor, atol=1e-3), name
    driver.host.close()


def test_under_autocast_the_ir_takes_over_and_says_so(swapped: Driver):
    x, y = swapped.batches[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        class_loss(swapped.host(x), y).backward()
    swapped.train(1)
    (rung,) = swapped.changes[-1].rungs
    assert rung.rung is Rung.IR
    assert "autocast" in rung.reason
    assert swapped.seed().native is None


def test_code_that_will_not_do_leaves_the_ir_in_place(built: Built):
    driver, shelf = grafting()
    slow = built.changed(timing=built.unsigned.manifest.native.timing.model_copy(update={"ratio": 1.2}))
    shelf.containers[kernel_id_of(slow)] = slow
    for kernel_id, words in ((kernel_id_of(slow), "1.20 of eager"), ("f" * 64, "no kernel")):
        driver.host.request_native("s0", kernel_id)
        awaited(driver)
        driver.train(1)
        (rung,) = driver.changes[-1].rungs
        assert rung.rung is Rung.IR
        assert words in rung.reason
        assert driver.seed().native is None
    driver.host.close()


def test_a_resumed_host_asks_for_its_code_again(built: Built, swapped: Driver):
    state, weights = swapped.host.growth_state(), copy.deepcopy(swapped.host.state_dict())
    shelf = Shelf()
    shelf.containers[built.artifact.kernel_id] = built.container
    host = wrapped("mlp", hub=shelf)
    host.load_growth_state(state)
    host.load_state_dict(weights)
    resumed = Driver("mlp", host)
    assert resumed.seed().native is None
    awaited(resumed)
    resumed.train(1)
    assert resumed.seed().native == built.artifact.kernel_id
    # a rollback in the same process goes the same way
    host.load_growth_state(state)
    awaited(resumed)
    resumed.optimizer = torch.optim.AdamW([p for _, p in host.live_parameters()])
    resumed.train(1)
    assert resumed.seed().native == built.artifact.kernel_id
    host.close()


def test_an_export_is_the_plain_module_from_the_ir(swapped: Driver):
    plain = pickle.loads(pickle.dumps(export(swapped.host)))
    x = batches("mlp", 1)[0][0]
    swapped.host.eval(), plain.eval()
    assert torch.allclose(plain(x), swapped.host(x), atol=1e-5)
    assert not [m for m in plain.modules() if "esper" in type(m).__module__]


def test_native_code_counts_as_its_ir(swapped: Driver):
    x, y = swapped.batches[0]
    native = HostCosts(swapped.host, class_loss).training_step(x, y)
    layer, seed = swapped.host._life.find("s0")
    layer.put_native(seed, None)
    assert HostCosts(swapped.host, class_loss).training_step(x, y) == native > 0


def test_a_cull_takes_the_code_along(swapped: Driver):
    from esper.leyline import Action

    swapped.command(Action.CULL, SITES["mlp"], "s0")
    assert swapped.stage() is SeedStage.CULLED
    assert not swapped.host._life.find("s0")[0].natives
    swapped.train(1)


# ---------------------------------------------------------------- several ranks


class Meeting:
    """The mean over the hosts of two threads: what `torch.distributed` gives two processes."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._given: dict[int, list[torch.Tensor]] = {}

    def mean(self, tensors) -> None:
        self._given[threading.get_ident()] = [tensor.clone() for tensor in tensors]
        self._barrier.wait()
        means = [torch.stack(parts).mean(0) for parts in zip(*self._given.values(), strict=True)]
        self._barrier.wait()
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean)


@pytest.mark.parametrize("both", [True, False])
def test_ranks_swap_at_one_step_or_not_at_all(built: Built, both: bool):
    drivers = [grafting(built)[0] for _ in range(2)]
    if not both:
        drivers[1].host._life.arrivals.loader._allows_native = False
    meeting = Meeting()
    found: list[list[tuple[int, Rung]]] = [[], []]

    def run(rank: int) -> None:
        host = drivers[rank].host
        host.share(meeting.mean, world=2)
        if rank == 0:  # this rank is ready at once, the other one later
            host.request_native("s0", built.artifact.kernel_id)
            awaited(drivers[0])
        else:
            host.request_native("s0", built.artifact.kernel_id)
        for step in range(100, 200_000):  # both come round long before: how many steps a load takes is no matter
            change = host.prepare(step, epoch=9, steps_per_epoch=4, observe=False)
            found[rank] += [(rung.step, rung.rung) for rung in change.rungs]
            if found[rank]:
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found[0] == found[1]
    assert [rung for _, rung in found[0]] == [Rung.NATIVE if both else Rung.IR]
    for driver in drivers:
        assert (driver.seed().native is not None) is both
        driver.host.close()


RANK = """
import os
import sys
import threading
from pathlib import Path
import torch
from torch import distributed
from kasmina_support import DESIGNS, SITES, Driver, Shelf, batches, class_loss, wrapped
from esper.leyline import SiteKind, SiteSignature
from esper.leyline.container import kernel_id_of
from esper.tolaria.ranks import TorchRanks

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
ranks = TorchRanks()
code = (folder / "native.kernel").read_bytes()

def train(swaps):
    shelf = Shelf()
    shelf.containers[kernel_id_of(code)] = code
    host = wrapped("mlp", hub=shelf)
    kernel_id = shelf.put(DESIGNS["mlp"], SiteSignature(kind=SiteKind.VECTOR, channels=8))
    driver = Driver("mlp", host).to_grafting(SITES["mlp"], kernel_id)
    host.share(ranks.mean_, world=2)
    model = ranks.parallel(host.module, [name for name, _ in host.live_parameters()])
    mine, rungs, began = batches("mlp", 64, seed=100 + rank), [], driver.step
    loaded = threading.Event()
    fetch = shelf.fetch
    shelf.fetch = lambda kernel_id: loaded.wait(60.0) and fetch(kernel_id)
    for step in range(24):
        if swaps and step == 4:
            host.request_native("s0", kernel_id_of(code))
        if step == 4 + 4 * rank:  # one rank has it sooner
            loaded.set()
        if step == 12:
            for _, _, future in list(host._life.arrivals._natives._loading.values()):
                future.exception(timeout=120)
        change = driver.take(host.prepare(driver.step, epoch=9, steps_per_epoch=4, observe=False))
        assert not change.joined and not change.left
        rungs += [(rung.step, rung.rung.value) for rung in change.rungs]
        x, y = mine[step]
        driver.optimizer.zero_grad()
        class_loss(model(x), y).backward()
        driver.optimizer.step()
        driver.step += 1
    layer, seed = host._life.find("s0")
    native = layer.natives.get("s0")
    runs_native = native is not None and native.fallback is None
    return {"weights": host.state_dict(), "rungs": rungs, "native": runs_native, "began": began}

torch.save({"swapped": train(True), "twin": train(False)}, folder / f"{rank}.pt")
distributed.barrier()
os._exit(0)  # what is left of gloo's threads may abort a process whose interpreter ends
"""


def test_two_processes_swap_at_one_step_and_stay_equal(built: Built, tmp_path):
    (tmp_path / "native.kernel").write_bytes(built.container)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["swapped"]["native"]
    assert second["swapped"]["native"]
    assert first["swapped"]["rungs"] == second["swapped"]["rungs"]
    [(step, rung)] = first["swapped"]["rungs"]
    assert rung == "native"
    assert step >= first["swapped"]["began"] + 8
    assert first["twin"]["rungs"] == []
    for name, tensor in first["swapped"]["weights"].items():
        assert torch.equal(tensor, second["swapped"]["weights"][name]), name
        assert torch.allclose(tensor, first["twin"]["weights"][name], atol=1e-3), name
