"""A trained plain model to start from: its weights, as its owner saved them, put into the host before it ever trains.

Two forms are read: safetensors, and what `torch.save(model.state_dict(), ...)` wrote, by `weights_only=True`, so that
nothing in a file is run. The file must be that of this very host: every tensor in its place, none over. Extra state
of modules is taken from a file that has it; safetensors cannot, and then it stays as the host has it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import nn

from esper.config import Host, RunHost
from esper.leyline.errors import ConfigError
from esper.leyline.growth import PREFIX
from esper.storage import driver_errors

FIELD = "host.weights"
_SHOWN = 3
_WRAPPERS = {"module.": "DataParallel or DistributedDataParallel", "_orig_mod.": "torch.compile"}


@dataclass(frozen=True)
class Trained:
    """A model that was trained before.

    Attributes:
        address: of its weights; None where they are in the model already.
        options: of the fsspec driver. Not shown in the repr: they may hold secrets.
        origin: the run whose weights are in the model already; empty for none.
    """

    address: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    origin: str = ""

    @classmethod
    def of(cls, host: Host) -> Trained | None:
        """What a configured host starts from; None for new weights."""
        origin = host.run if isinstance(host, RunHost) else ""
        if host.weights is None and not origin:
            return None
        return cls(host.weights, host.weights_options, origin)

    @property
    def shown(self) -> str:
        """The address, or the run, as people write it; empty without one."""
        return self.address or self.origin

    def load_into(self, model: nn.Module) -> None:
        """Puts the weights into a host, plain or wrapped; with no address the model stays as it is.

        Raises:
            ConfigError: if the file cannot be read, or is not that of this host; the host is then as it was.
        """
        if self.address is None:
            return
        given = read_weights(self.address, self.options)
        own = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{PREFIX}.")}
        extra = {name: given.pop(name) for name in own if _is_extra(name) and name in given}
        own = {name: tensor for name, tensor in own.items() if not _is_extra(name)}
        _require_equal_form(given, own, self.address)
        _require_sound(given, own, self.address)
        for name, value in extra.items():
            model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)


def read_weights(address: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads a `state_dict`: tensors, on the CPU, and what modules have put in by `get_extra_state`.

    Args:
        address: a path, or any fsspec address.
        options: of the fsspec driver, for an address with a scheme.

    Raises:
        ConfigError: if there is no such file, or it holds anything else.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(address, **(dict(options or {}) if "://" in address else {}))
        content = filesystem.cat_file(path)
    except driver_errors() as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise ConfigError(
            f"cannot read {address}: {reason}",
            field=FIELD,
            remedy="esper export RUN --out host.safetensors writes one of a trained run",
        ) from error
    try:
        # the header of safetensors is JSON behind its length
        found = safetensors.torch.load(content) if content[8:9] == b"{" else _unpickled(content)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{address} holds no weights that can be read safely: {reason}",
            field=FIELD,
            remedy="a safetensors file, or torch.save(model.state_dict(), ...)",
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(value, torch.Tensor) or _is_extra(str(name)) for name, value in found.items()
    ):
        holds = _few(map(str, found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ConfigError(
            f"{address} is no state_dict: it holds {holds}", field=FIELD, remedy="save model.state_dict() alone"
        )
    return {str(name): tensor for name, tensor in found.items()}


def _unpickled(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _require_equal_form(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], address: str) -> None:
    twins = _twins(own)
    missing = [name for name in own if name not in given and not any(twin in given for twin in twins[name])]
    unexpected = [name for name in given if name not in own]
    misshaped = [name for name in given if name in own and given[name].shape != own[name].shape]
    faults = []
    if missing:
        faults.append(f"it lacks {_few(missing)}")
    if unexpected:
        faults.append(f"the host has no {_few(unexpected)}")
    if misshaped:
        shapes = (f"{name} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}" for name in misshaped)
        faults.append(_few(shapes, separator="; "))
    if faults:
        raise ConfigError(
            f"{address} is not of this host: {'; '.join(faults)}", field=FIELD, remedy=_remedy(given, unexpected)
        )


def _remedy(given: Mapping[str, torch.Tensor], unexpected: list[str]) -> str:
    for prefix, wrapper in _WRAPPERS.items():
        if given and all(name.startswith(prefix) for name in given):
            return f"it was saved through {wrapper}: save the state_dict of the model inside"
    if any(".grown." in f".{name}" for name in unexpected):
        return "it is of a model that has grown: start from the host before, or go on with esper train --resume"
    return "set host as it was when these weights were trained"


def _require_sound(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], address: str) -> None:
    for name, tensor in given.items():
        if _kind(tensor) != _kind(own[name]):
            raise ConfigError(f"{address}: {name} is {tensor.dtype}, the host's is {own[name].dtype}", field=FIELD)
        is_meant = ~own[name].isfinite().to(tensor.device)  # a mask may be made of infinities
        if not bool((tensor.isfinite() | is_meant).all()):
            raise ConfigError(f"{address}: {name} holds values that are not finite", field=FIELD)
    for name, others in _twins(own).items():
        twin = next((twin for twin in others if name in given and twin in given), None)
        if twin is not None and not torch.equal(given[name], given[twin]):
            raise ConfigError(f"{address}: {name} and {twin} are tied in this host, and differ there", field=FIELD)


def _is_extra(name: str) -> bool:
    """Whether it is no tensor of the model, but what a module gave by `get_extra_state`."""
    return name.rpartition(".")[2] == "_extra_state"


def _kind(tensor: torch.Tensor) -> str:
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def _twins(own: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Name to the names of the same tensor (tied weights); one name of each suffices in a file."""
    places: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in own.items():
        if tensor.numel():
            places.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    found = {name: [other for other in names if other != name] for names in places.values() for name in names}
    return {name: found.get(name, []) for name in own}


def _few(names: Iterable[str], *, separator: str = ", ") -> str:
    listed = list(names)
    more = f"{separator}and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return separator.join(listed[:_SHOWN]) + more
