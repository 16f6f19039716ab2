"""Where a host can grow: finds sites, and gives each the signature that a kernel must fit.

A site is a submodule that is called exactly once a forward and whose output is one float tensor of a known layout, but
not the host's own output; of a tuple or a dict, the tensor is named (see `outputs`). `auto` takes the outputs of
blocks (of a tuple or a dict, the first tensor that fits):

- containers (`Sequential`, `ModuleList`, `ModuleDict`), the host itself and modules that hold a container of blocks
  are walked through;
- any other module with children is a block: its output is a site; where that leaves no site at all, because a module
  only frames another, blocks that put out the host's own output are walked through too;
- leaves in a run (convolution or linear layer, norm, activation, pool) give one site: the output of the activation, or
  of the pool after it, else of the layer with its norm. The last layer of all is the head, and no site.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from esper.kasmina.outputs import MARK, part_of, parts, path_of, take
from esper.kasmina.probe import Call, Probe, is_output, probe
from esper.leyline.errors import SiteError
from esper.leyline.kernels import SiteKind, SiteSignature

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,  # noqa: SLF001 - the one base of all convolutions
)
_POOLS = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "FractionalMaxPool", "LPPool")
_SHOWN = 5
_KINDS = {2: SiteKind.VECTOR, 3: SiteKind.SEQUENCE, 4: SiteKind.FEATURE_MAP}


class SiteWarning(UserWarning):
    """A pattern names modules that cannot carry a seed beside those that can."""


def find_sites(
    module: nn.Module,
    example: tuple[Any, ...],
    *,
    sites: Literal["auto"] | Sequence[str] = "auto",
    causal: bool = False,
) -> dict[str, SiteSignature]:
    """Finds the sites of a host by one forward that changes nothing.

    Args:
        module: the host, not yet wrapped.
        example: positional inputs of the host, such as one batch; the first tensor's first dim is the batch.
        sites: `auto`, or module paths, globs (`blocks.*`; a star stays within one part of a path) and names of module
            classes (`TransformerBlock`), each with the name of a tensor where the output holds several (`blocks.*#0`).
        causal: whether sequences may only look back.

    Returns:
        Site (module path, and the tensor's name) to signature, in forward order.

    Raises:
        SiteError: if a named site does not exist or cannot carry a seed, or if none is found.
    """
    seen = probe(module, example)
    if sites == "auto":
        names = _automatic(module, seen)
        remedy = f"name the sites yourself: module paths or globs{_reasons(module, seen)}"
    else:
        names = [name for pattern in sites for name in _named(module, seen, pattern)]
        remedy = None
    ordered = sorted(dict.fromkeys(names), key=lambda name: seen.calls[path_of(name)].order)
    if not ordered:
        raise SiteError("this model has no place where a seed could stand", field="sites", remedy=remedy)
    return {name: _signature(_tensor(seen, name), causal=causal) for name in ordered}


# ---------------------------------------------------------------- named


def _named(module: nn.Module, seen: Probe, pattern: str) -> list[str]:
    wanted, mark, part = pattern.partition(MARK)
    modules = {name: m for name, m in module.named_modules() if name}
    if wanted in modules:
        reason = _unfit(seen, pattern)
        if reason is not None:
            raise SiteError(f"{pattern} cannot carry a seed: {reason}", field="sites")
        return [pattern]
    chosen = [path for path, m in modules.items() if _matches(path, wanted) or type(m).__name__ == wanted]
    fitting = [site for site in (f"{path}{mark}{part}" for path in chosen) if _unfit(seen, site) is None]
    unfit = [(path, reason) for path in chosen if (reason := _unfit(seen, f"{path}{mark}{part}")) is not None]
    if not fitting:
        available = [site for path in modules for site in _sites_of(seen, path)]
        close = difflib.get_close_matches(pattern, available, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        why = f" that can carry a seed ({_listed(unfit)})" if unfit else ""
        raise SiteError(
            f"no site {pattern!r} in this model{why}",
            field="sites",
            remedy=f"{hint}it has {', '.join(available) or 'no fitting place'}",
        )
    if unfit:
        warnings.warn(f"{pattern} also names what cannot carry a seed: {_listed(unfit)}", SiteWarning, stacklevel=2)
    return fitting


def _listed(unfit: Sequence[tuple[str, str]]) -> str:
    more = f"; and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
    return "; ".join(f"{path}: {reason}" for path, reason in unfit[:_SHOWN]) + more


def _reasons(module: nn.Module, seen: Probe) -> str:
    """Why blocks of a host are no sites, for one that has none."""
    blocks = [name for name, block in module.named_modules() if name and not _is_leaf(block)]
    unfit = [(name, reason) for name in blocks if name in seen.calls and (reason := _unfit(seen, name)) is not None]
    return f" ({_listed(unfit)})" if unfit else ""


def _sites_of(seen: Probe, path: str) -> list[str]:
    """What can be a site at a module: itself, or the tensors of its output that fit."""
    if path not in seen.calls:
        return []
    output = seen.calls[path].output
    names = [path] if isinstance(output, torch.Tensor) else [f"{path}{MARK}{name}" for name, _ in parts(output)]
    return [name for name in names if _unfit(seen, name) is None]


def _tensor(seen: Probe, site: str) -> torch.Tensor:
    return take(seen.calls[path_of(site)].output, part_of(site))


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _unfit(seen: Probe, site: str) -> str | None:
    """Why a submodule, or a tensor of its output, cannot be a site; None if it can."""
    path, mark, part = site.partition(MARK)
    call = seen.calls.get(path)
    if call is None:
        return "the forward does not call it"
    if call.count != 1:
        return f"the forward calls it {call.count} times"
    entries = dict(parts(call.output))
    if mark and part not in entries:
        known = ", ".join(f"{path}{MARK}{name}" for name in entries)
        return f"its output has no {part!r}{f'; it has {known}' if known else ''}"
    h = entries[part] if mark else call.output
    if not isinstance(h, torch.Tensor):
        fitting = [] if mark else _sites_of(seen, path)
        named = f"; name one of it: {', '.join(fitting)}" if fitting else ""
        if not mark and not named and isinstance(h, tuple | list) and type(h) is not tuple:
            named = "; of a plain tuple or a dict one could be named"
        return f"it puts out {type(h).__name__}, not one tensor{named}"
    return _unfit_tensor(seen, h)


def _unfit_tensor(seen: Probe, h: torch.Tensor) -> str | None:
    """Why a submodule's tensor cannot be a site; None if it can."""
    if not h.is_floating_point() or h.layout != torch.strided or h.is_nested:
        return f"it puts out a tensor of {h.dtype}, {h.layout}, which no kernel computes"
    if h.ndim not in _KINDS:
        return f"its output has {h.ndim} dims; a vector has 2, a sequence 3, a feature map 4"
    if h.shape[0] != seen.batch:
        return f"its output does not begin with the batch ({h.shape[0]} instead of {seen.batch})"
    if h.device.type not in {"cpu", "cuda"}:
        return f"it computes on {h.device.type}"
    if is_output(seen, h):
        return "it is the model's own output"
    return None


def _signature(h: torch.Tensor, *, causal: bool) -> SiteSignature:
    kind = _KINDS[h.ndim]
    channels = h.shape[2] if kind is SiteKind.SEQUENCE else h.shape[1]
    extent = {SiteKind.VECTOR: (), SiteKind.SEQUENCE: (h.shape[1],), SiteKind.FEATURE_MAP: tuple(h.shape[2:])}[kind]
    return SiteSignature(
        kind=kind,
        channels=channels,
        extent=extent,
        dtype=str(h.dtype).removeprefix("torch."),
        device=h.device.type,
        causal=causal and kind is SiteKind.SEQUENCE,
    )


# ---------------------------------------------------------------- automatic


def _automatic(module: nn.Module, seen: Probe) -> list[str]:
    layers = [name for name, m in module.named_modules() if name in seen.calls and isinstance(m, _LAYERS)]
    head = max(layers, key=lambda name: seen.calls[name].order, default=None)
    found: list[str] = []
    _walk(module, "", seen, head, found, through_output=False)
    if not found:
        _walk(module, "", seen, head, found, through_output=True)
    return found


def _walk(
    module: nn.Module, path: str, seen: Probe, head: str | None, found: list[str], *, through_output: bool
) -> None:
    run: list[tuple[str, str]] = []  # path and role of the leaves since the last layer
    for name, child in _in_call_order(module, path, seen):
        role = _role(child)
        if role == "layer":
            found.extend(_site_of_run(run, seen, head))
            run = [(name, role)]
        elif _is_leaf(child):
            # a leaf without a role (dropout, flatten) does not end the run
            run.extend([(name, role)] if run and role is not None else [])
        else:
            found.extend(_site_of_run(run, seen, head))
            run = []
            if _walks_through(child) or (through_output and _puts_out_the_output(seen, name)):
                _walk(child, name, seen, head, found, through_output=through_output)
            else:
                found.extend([site for site in _sites_of(seen, name) if _is_useful(seen, site)][:1])
    found.extend(_site_of_run(run, seen, head))


def _site_of_run(run: Sequence[tuple[str, str]], seen: Probe, head: str | None) -> list[str]:
    """The one site of a run of leaves: the latest that fits, the activation (or the pool after it) before the layer.

    None for the head: no layer with weights comes after it, so what it puts out are the logits.
    """
    if not run or run[0][0] == head:
        return []
    roles = [role for _, role in run]
    after = roles.index("activation") if "activation" in roles else 0
    wanted = ({"activation", "pool"}, {"layer", "norm"})
    for kinds in wanted:
        for place in range(len(run) - 1, -1, -1):
            name, role = run[place]
            # a pool is taken only where it follows an activation
            if role in kinds and (role != "pool" or 0 < after < place) and _is_useful(seen, name):
                return [name]
    return []


def _is_useful(seen: Probe, name: str) -> bool:
    """Whether a module can be a site and there is something to learn there: more than one channel and position."""
    if _unfit(seen, name) is not None:
        return False
    signature = _signature(_tensor(seen, name), causal=False)
    return signature.channels > 1 and signature.extent != (1, 1)


def _in_call_order(module: nn.Module, path: str, seen: Probe) -> list[tuple[str, nn.Module]]:
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    first = {name: _first_call(name, seen.calls) for name, _ in children}
    return sorted((item for item in children if first[item[0]] is not None), key=lambda item: first[item[0]] or 0)


def _first_call(name: str, calls: Mapping[str, Call]) -> int | None:
    """When a module or anything in it was first called: containers such as `ModuleList` are not called themselves."""
    orders = [call.order for path, call in calls.items() if path == name or path.startswith(f"{name}.")]
    return min(orders, default=None)


def _puts_out_the_output(seen: Probe, path: str) -> bool:
    output = seen.calls[path].output if path in seen.calls else None
    return isinstance(output, torch.Tensor) and is_output(seen, output)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None and not isinstance(module, _CONTAINERS)


def _walks_through(module: nn.Module) -> bool:
    """Whether a module is a frame around blocks: a container, or a module that holds a container of blocks."""
    if isinstance(module, _CONTAINERS):
        return True
    return any(
        not _is_leaf(block)
        for child in module.children()
        if isinstance(child, _CONTAINERS)
        for block in child.children()
    )


def _role(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, _LAYERS):
        return "layer"
    if kind.startswith(_POOLS):
        return "pool"
    if "Norm" in kind:
        return "norm"
    if type(module).__module__ == "torch.nn.modules.activation" and kind != "MultiheadAttention":
        return "activation"
    return None
