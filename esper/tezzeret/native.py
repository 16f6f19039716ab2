"""Native code for a lowered module: one library for the forward and one for the backward, by AOTInductor.

Parameters are passed in at every call, so the libraries hold no weights; the batch is dynamic. torch has no public way
to export a backward: this module alone touches the private ones (`torch._functorch`, `torch._inductor`), and torch is
pinned for it. It takes tens of seconds and runs a C++ compiler, so it belongs into a process of its own.
"""

from __future__ import annotations

import copy
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from esper.leyline import KernelRejectedError, SiteSignature, UnavailableError
from esper.leyline.native import BACKWARD, FORWARD, FRESH, OUTPUT, NativeFacts
from esper.leyline.target import target_here

TRACE_BATCH = 64
"""Samples of the traced input. Generated code may demand a batch near it: smaller ones run from the IR."""
MAX_BATCH = 1 << 16
"""Largest batch that is tried against the guards; larger ones run from the IR."""
_KEPT = ("native_group_norm", "native_group_norm_backward")
"""Ops that stay torch's own: on a CPU they are faster whole than taken apart and fused."""
_ONE_AT_A_TIME = threading.Lock()
"""Inductor's tables and caches belong to the process."""


@dataclass(frozen=True, slots=True)
class NativeCode:
    """What was built; nothing of it was run yet."""

    facts: NativeFacts
    payload: Mapping[str, bytes]


@dataclass(slots=True)
class _Graph:
    """A graph of functional ops and the fake tensors it was traced with."""

    module: fx.GraphModule
    inputs: list[Any]


def compile_native(module: nn.Module, signature: SiteSignature, *, scratch: Path | None = None) -> NativeCode:
    """Compiles a lowered module for the machine that this runs on.

    Args:
        module: on the CPU, in the signature's dtype; not changed.
        signature: the site; its device says what is compiled for.
        scratch: a folder for intermediate files; None makes one and removes it.

    Raises:
        KernelRejectedError: if torch cannot lower the design, or makes of it what cannot be used: it is fine without.
        UnavailableError: if this machine cannot compile, whatever the design: no C++ compiler, memory, disk or GPU.
    """
    if signature.device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError("native code for a GPU is built on one", field="signature.device")
    with _ONE_AT_A_TIME, ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own internals here
        folder = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-native-")))
        stack.enter_context(_settings(signature.device))
        stack.enter_context(_inductor_cache(folder))
        device = torch.device(signature.device)
        try:
            copied = copy.deepcopy(module).to(device).train().requires_grad_()
            return _compile(_contiguous(copied), signature, folder)
        except KernelRejectedError:
            raise
        except Exception as error:  # the compiler's own errors have no common root; each says that it cannot do this
            words = " ".join(str(error).split())[:300]
            if is_of_the_machine(error):
                raise UnavailableError(
                    f"no native code can be compiled here: {type(error).__name__}: {words}", remedy="see `esper doctor`"
                ) from error
            raise KernelRejectedError(f"torch cannot lower it: {type(error).__name__}: {words}") from error


def is_of_the_machine(error: BaseException) -> bool:
    """Whether the cause of an error, however torch wrapped it, is where the compiler runs and not what it compiles."""
    from torch._inductor import exc

    causes = (
        OSError, MemoryError, subprocess.SubprocessError, torch.OutOfMemoryError,
        exc.InvalidCxxCompiler, exc.CppCompileError, exc.TritonMissing, exc.GPUTooOldForTriton,
    )  # fmt: skip
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        # torch's allocator on the CPU has no error of its own
        if isinstance(one, causes) or "DefaultCPUAllocator" in str(one):
            return True
        seen.append(one)
        waiting += [one.__cause__, getattr(one, "inner_exception", None)]
        if not one.__suppress_context__:
            waiting.append(one.__context__)
    return False


def _contiguous(module: nn.Module) -> nn.Module:
    """The module, changed: its y is contiguous. The backward is compiled for gradients with the strides of y, does not
    look at those that it is given, and the runtime gives it contiguous ones.
    """
    assert isinstance(module, fx.GraphModule)  # it is traced by its graph, not by its `forward`
    [result] = module.graph.find_nodes(op="output")
    y = result.args[0]
    assert isinstance(y, fx.Node)
    with module.graph.inserting_before(result):
        result.args = (module.graph.call_method("contiguous", (y,)),)
    module.recompile()
    return module


def _compile(module: nn.Module, signature: SiteSignature, folder: Path) -> NativeCode:
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    h = _fake_input(mode, signature)
    parameters, forward, backward = _trace(module, h)
    saved, keeps_input, keeps_output = _share_out(forward, backward)
    gradients = _drop_missing(backward)
    libraries: dict[str, bytes] = {}
    target = target_here(signature.device)
    for name, graph in ((FORWARD, forward), (BACKWARD, backward)):
        with mode, tracing(TracingContext(mode)):
            libraries |= _library(graph, folder / name, name)
    low, high = _batches(mode.shape_env, h)
    facts = NativeFacts(
        target=target,
        dtype=signature.dtype,
        parameters=parameters,
        shape=signature.shape(1)[1:],
        min_batch=low,
        max_batch=high,
        saved=saved,
        gradients=gradients,
        keeps_input=keeps_input,
        keeps_output=keeps_output,
    )
    prefix = facts.member("", "").rstrip(".")
    return NativeCode(facts, {prefix + name: body for name, body in sorted(libraries.items())})


# ---------------------------------------------------------------- tracing


def _fake_input(mode: Any, signature: SiteSignature) -> torch.Tensor:
    """The input, with a symbolic batch and all other dims fixed."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    shape = signature.shape(TRACE_BATCH)
    example = torch.zeros(shape, dtype=getattr(torch, signature.dtype), device=signature.device, requires_grad=True)
    sizes = [DimDynamic.DYNAMIC, *([DimDynamic.STATIC] * (len(shape) - 1))]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(example, source=ConstantSource("h"), symbolic_context=context)


def _trace(module: nn.Module, h: torch.Tensor) -> tuple[tuple[str, ...], _Graph, _Graph]:
    """The parameters' names in order, the forward and the backward."""
    from torch._functorch import config
    from torch._functorch.aot_autograd import (
        aot_compile_joint_with_descriptors,
        aot_export_joint_with_descriptors,
    )
    from torch._functorch.partitioners import default_partition
    from torch._inductor.decomposition import select_decomp_table

    caught: dict[str, _Graph] = {}

    def catch(name: str) -> Any:
        def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            caught[name] = _Graph(copy.deepcopy(gm), list(example_inputs))

            def run(args: Sequence[Any]) -> Any:
                return gm(*args)

            run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess] # noqa: SLF001 - AOT autograd's protocol
            return run

        return compiler

    with ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, module, (h,), decompositions=dict(select_decomp_table()))
        # the default partition: min-cut keeps masks of relu as bools, whose fused kernels are slow on a CPU
        with config.patch(force_non_lazy_backward_lowering=True):
            aot_compile_joint_with_descriptors(
                joint, partition_fn=default_partition, fw_compiler=catch(FORWARD), bw_compiler=catch(BACKWARD)
            )
    facts = joint._aot_state.fw_metadata  # noqa: SLF001 - see the module's docstring
    if joint.buffers_spec or facts.num_mutated_inp_runtime_indices or facts.num_outputs != 1:
        raise KernelRejectedError("a kernel with buffers or several outputs has no native form")
    if BACKWARD not in caught:
        raise KernelRejectedError("a kernel without a gradient has no native form")
    if not caught[BACKWARD].inputs[-1].is_contiguous():
        raise KernelRejectedError("a kernel whose output is not contiguous has no native form")
    return tuple(joint.params_spec), caught[FORWARD], caught[BACKWARD]


def _share_out(forward: _Graph, backward: _Graph) -> tuple[tuple[int, ...], bool, bool]:
    """Lets only fresh tensors cross from the forward to the backward; sizes are read off tensors, inputs and y are at
    the caller's hand already.

    Returns:
        `NativeFacts.saved`, `keeps_input` and `keeps_output`.
    """
    placeholders = forward.module.graph.find_nodes(op="placeholder")
    result = forward.module.graph.find_nodes(op="output")[0]
    y, *rest = result.args[0]
    fresh: list[fx.Node] = []
    saved: list[int] = []
    keeps_input = keeps_output = False
    for node in rest:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue  # a size: `_without_sizes` reads it off a tensor
        base = _base(node)
        keeps_input |= base is placeholders[-1]
        keeps_output |= base is _base(y)
        if node in placeholders:
            saved.append(placeholders.index(node))
        elif node is y:
            saved.append(OUTPUT)
        else:
            saved.append(FRESH)
            fresh.append(node)
    result.args = ((y, *fresh),)
    forward.module.graph.eliminate_dead_code()
    forward.module.recompile()
    _without_sizes(backward)
    return tuple(saved), keeps_input, keeps_output


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a chain of views ends in."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 - its public name
        arguments = node.target._schema.arguments  # noqa: SLF001 - torch has no public way to a schema
        shared = [index for index, argument in enumerate(arguments) if argument.alias_info is not None]
        if not shared or shared[0] >= len(node.args) or not isinstance(source := node.args[shared[0]], fx.Node):
            break
        node = source
    return node


def _without_sizes(backward: _Graph) -> None:
    """Replaces every symbolic size among the inputs by one that is read off an input tensor."""
    graph = backward.module.graph
    nodes = graph.find_nodes(op="placeholder")
    tensors = [(n, value) for n, value in zip(nodes, backward.inputs, strict=True) if isinstance(value, torch.Tensor)]
    for node, value in zip(nodes, backward.inputs, strict=True):
        if isinstance(value, torch.Tensor):
            continue
        source, dim = next(
            (n, d) for n, tensor in tensors for d, size in enumerate(tensor.shape) if str(size) == str(value)
        )
        if node.users:
            with graph.inserting_after(nodes[-1]):
                size = graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
                size.meta["val"] = value
            node.replace_all_uses_with(size)
        graph.erase_node(node)
    backward.inputs = [value for _, value in tensors]
    graph.lint()
    backward.module.recompile()


def _drop_missing(backward: _Graph) -> tuple[int, ...]:
    """Takes gradients that do not exist out of the backward's results; returns the places of the others."""
    result = backward.module.graph.find_nodes(op="output")[0]
    found = [(at, node) for at, node in enumerate(result.args[0]) if node is not None]
    result.args = (tuple(node for _, node in found),)
    backward.module.recompile()
    return tuple(at for at, _ in found)


# ---------------------------------------------------------------- compiling


def _library(graph: _Graph, folder: Path, name: str) -> dict[str, bytes]:
    """Compiles one graph; returns the stripped library, and the JSON of its proxy executor where it has one."""
    from torch._inductor import aot_compile

    folder.mkdir(parents=True, exist_ok=True)
    made = aot_compile(
        graph.module, tuple(graph.inputs), options={"aot_inductor.output_path": str(folder / f"{name}.so")}
    )
    if not isinstance(made, str):
        raise KernelRejectedError("the native compiler made no library")
    library = Path(made)
    subprocess.run(["strip", "--strip-unneeded", library], check=True, capture_output=True)  # noqa: S603, S607 - own file
    found = {f"{name}.so": library.read_bytes()}
    proxies = [path for path in folder.rglob("*.wrapper.json") if not path.stem.endswith("_metadata")]
    if len(proxies) > 1:
        raise KernelRejectedError(f"the native compiler made {len(proxies)} tables of proxied ops for one library")
    if proxies:
        found[f"{name}.json"] = proxies[0].read_bytes()
    return found


def _batches(shapes: Any, h: torch.Tensor) -> tuple[int, int]:
    """The run of batches around the traced one for which every guard holds."""
    symbol = h.shape[0].node.expr  # pyright: ignore[reportAttributeAccessIssue]
    guards = [guard.expr for guard in shapes.guards if symbol in guard.expr.free_symbols]

    def holds(batch: int) -> bool:
        return all(bool(guard.subs(symbol, batch)) for guard in guards)

    low = TRACE_BATCH
    while low > 1 and holds(low - 1):
        low -= 1
    high = TRACE_BATCH
    while high < MAX_BATCH and holds(high + 1):
        high = high * 2 if holds(high * 2) and all(map(holds, range(high, high * 2, max(1, high // 16)))) else high + 1
    return low, high


# ---------------------------------------------------------------- Inductor's settings


@contextmanager
def _settings(device: str) -> Iterator[None]:
    """Within it, Inductor compiles as was measured best, and knows nothing of the ops that are kept whole."""
    from torch._inductor import config, decomposition, lowering

    changes: dict[str, Any] = {
        "layout_optimization": False,
        "cpp.dynamic_threads": True,  # else the builder's thread count is baked in
        "aot_inductor.compile_wrapper_opt_level": "O1",
        "fallback_random": True,
    }
    if device == "cuda":
        changes["aot_inductor.embed_kernel_binary"] = True
    removed: dict[Any, Any] = {}
    table = decomposition.decompositions
    if device == "cpu":
        removed = {op: table[op] for op in list(table) if any(str(op).startswith(f"aten.{name}.") for name in _KEPT)}
    constraints = lowering._maybe_layout_constraints  # noqa: SLF001 - its setter cannot take anything back
    before = [(book, {op: book[op] for op in removed if op in book}) for book in (lowering.lowerings, constraints)]
    for op in removed:
        del table[op]
        # it reads its inputs by the strides that were traced; else Inductor chooses others, unnoticed. `warn`: where
        # the variable CI is set, torch would have us take it apart
        lowering.make_fallback(op, lowering.constrain_to_fx_strides, warn=False)
    decomposition.fast_random_decomps.cache_clear()
    try:
        with config.patch(changes):
            yield
    finally:
        table.update(removed)
        for book, entries in before:
            for op in removed:
                book.pop(op, None)
            book.update(entries)
        decomposition.fast_random_decomps.cache_clear()


@contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    """Within it, Inductor keeps its intermediate files in `folder`."""
    from torch._inductor.utils import fresh_cache

    with fresh_cache(dir=str(folder)):
        yield
