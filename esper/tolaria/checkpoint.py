"""Checkpoints: a nested state as `state-*.json` and `tensors-*.safetensors`, vouched for by `manifest.json`.

    checkpoints/epoch-000012/{state-<hash>.json, tensors-<hash>.safetensors, manifest.json}
    checkpoints/best.json         which epoch was best so far

The manifest is written last and holds the sha256 of the others: without it there is no checkpoint, and with it any
change of a byte is seen. Data files carry their hash in the name, so writing an epoch again never touches files that
an older manifest vouches for. This works the same on a directory and on an object store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import safetensors
import safetensors.torch

from esper.leyline.contract import API_VERSION
from esper.leyline.errors import NotFoundError, TamperedError
from esper.leyline.ports import FaultPlan, NoFaults
from esper.storage import Storage
from esper.tolaria.tree import flatten, unflatten

log = logging.getLogger(__name__)

_EPOCH = re.compile(r"^epoch-(\d{6})$")


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
        epoch: the last epoch it holds.
        name: its folder, relative to the run's.
        state: as it was given to `save`; tensors lie on the CPU.
        refused: newer ones that were finished and are not whole, by epoch, and why.
    """

    epoch: int
    name: str
    state: dict[str, Any]
    refused: Mapping[int, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run's.
        keep: how many of the latest to keep; the best one is kept besides.
        faults: a script of faults, for tests; the place is `writing`, before the manifest makes it whole.
    """

    def __init__(self, folder: Storage, *, keep: int = 2, faults: FaultPlan | None = None) -> None:
        self._folder = folder
        self._keep = keep
        self._faults = faults or NoFaults()

    def save(self, epoch: int, state: dict[str, Any], *, best: bool = False) -> str:
        """Writes the checkpoint of an epoch and returns its name; older ones are removed afterwards.

        Args:
            epoch: the last epoch that `state` holds.
            state: nested dicts, lists and tuples of JSON values and tensors.
            best: whether `best` shall point to it from now on.

        Raises:
            StorageError: if the address cannot be written.
            TypeError: if `state` holds something else; names its place.
        """
        name = _name(epoch)
        tree, tensors = flatten(state)
        data = {
            "state": ("json", json.dumps(tree, separators=(",", ":")).encode()),
            "tensors": ("safetensors", safetensors.torch.save(tensors)),
        }
        files = {}
        for part, (suffix, content) in data.items():
            digest = hashlib.sha256(content).hexdigest()
            files[part] = {"name": f"{part}-{digest[:16]}.{suffix}", "sha256": digest, "size": len(content)}
            self._folder.write(f"{name}/{files[part]['name']}", content)
        self._faults.at("writing", epoch)
        manifest = {"api_version": API_VERSION, "epoch": epoch, "files": files}
        self._folder.write(f"{name}/manifest.json", json.dumps(manifest, indent=1).encode())
        if best:
            self._folder.write("checkpoints/best.json", json.dumps({"epoch": epoch}).encode())
        self._drop(name, files)
        self._prune()
        return name

    def load(self, epoch: int) -> Restored:
        """Reads the checkpoint of one epoch.

        Raises:
            NotFoundError: if there is none, or it was never finished.
            TamperedError: if a file is missing or is not what the manifest says.
        """
        name = _name(epoch)
        manifest_bytes = self._folder.read(f"{name}/manifest.json")
        try:
            manifest = json.loads(manifest_bytes)
            if manifest["epoch"] != epoch:
                raise TamperedError(f"{name} holds a manifest of epoch {manifest['epoch']}")
            parts = {part: self._read(name, entry) for part, entry in manifest["files"].items()}
            tree = json.loads(parts["state"])
            state = unflatten(tree, safetensors.torch.load(parts["tensors"]))
        except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise TamperedError(f"{name} is not a whole checkpoint: {error}") from error
        return Restored(epoch, name, state)

    def latest(self) -> Restored | None:
        """Returns the newest whole checkpoint; newer ones that are torn or altered are refused, and named in it. None
        if none was ever finished.

        Raises:
            TamperedError: if checkpoints were finished, and none of them is whole any more.
        """
        refused: dict[int, str] = {}
        for epoch in reversed(self.epochs()):
            try:
                return replace(self.load(epoch), refused=refused)
            except NotFoundError as error:  # nobody had finished it
                log.warning("checkpoint.unfinished", extra={"epoch": epoch, "reason": str(error)})
            except TamperedError as error:
                log.warning("checkpoint.refused", extra={"epoch": epoch, "reason": str(error)})
                refused[epoch] = error.message
        if refused:
            raise TamperedError(
                f"no checkpoint in {self._folder.shown} is whole: {'; '.join(refused.values())}",
                remedy="put the run's folder back from a copy, or begin a new run",
            )
        return None

    def best(self) -> Restored | None:
        """Returns the best checkpoint; None if none was marked.

        Raises:
            TamperedError: if it is not whole.
        """
        epoch = self._best_epoch()
        return None if epoch is None else self.load(epoch)

    def epochs(self) -> list[int]:
        """Returns the epochs for which there is a folder, in order; they may turn out not to be whole."""
        return sorted(int(m.group(1)) for name in self._folder.names("checkpoints") if (m := _EPOCH.match(name)))

    def last_name(self) -> str | None:
        """Name of the newest finished checkpoint, without reading it."""
        for epoch in reversed(self.epochs()):
            if "manifest.json" in self._folder.names(_name(epoch)):
                return _name(epoch)
        return None

    def _read(self, name: str, entry: dict[str, Any]) -> bytes:
        try:
            content = self._folder.read(f"{name}/{entry['name']}")
        except NotFoundError as error:
            raise TamperedError(f"{name} lacks {entry['name']}") from error
        if (hashlib.sha256(content).hexdigest(), len(content)) != (entry["sha256"], entry["size"]):
            raise TamperedError(f"{name}/{entry['name']} is not what its manifest vouches for")
        return content

    def _best_epoch(self) -> int | None:
        try:
            return int(json.loads(self._folder.read("checkpoints/best.json"))["epoch"])
        except NotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise TamperedError("checkpoints/best.json is not whole") from error

    def _drop(self, name: str, files: dict[str, Any]) -> None:
        """Removes data files of an earlier writing of the same epoch."""
        known = {entry["name"] for entry in files.values()} | {"manifest.json"}
        for other in self._folder.names(name):
            if other not in known:
                self._folder.remove(f"{name}/{other}")

    def _prune(self) -> None:
        try:
            best = self._best_epoch()
        except TamperedError as error:  # it may be any of them
            log.warning("checkpoint.best_unknown", extra={"reason": str(error)})
            return
        for epoch in self.epochs()[: -self._keep]:
            if epoch != best:
                self._folder.remove(_name(epoch))


def _name(epoch: int) -> str:
    return f"checkpoints/epoch-{epoch:06d}"
