"""The durable record of what Tamiyo decided: written before a signal is applied, read instead of asking again.

Deterministic mode alone needs it. On a directory it is one JSONL file, fsynced after each line; on an object store one
object an epoch. A torn last line is a decision that was never applied, and is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from esper.leyline.errors import ConflictError, NotFoundError, TamperedError
from esper.leyline.signals import AdaptationSignal
from esper.storage import Storage

FILE = "commands.jsonl"


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """One decision.

    Attributes:
        epoch, step: where it was taken; it is applied before the next epoch's first step.
        signal: what Tamiyo asked for.
        state: Tamiyo's state after it.
    """

    epoch: int
    step: int
    signal: AdaptationSignal
    state: dict[str, Any]

    def encode(self) -> bytes:
        """One line of JSON, with its line end."""
        signal = self.signal.model_dump(mode="json")
        entry = {"epoch": self.epoch, "step": self.step, "signal": signal, "state": self.state}
        return json.dumps(entry, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> LoggedDecision:
        """Inverse of `encode`; raises `ValueError` for anything else."""
        try:
            entry = json.loads(line)
            signal = AdaptationSignal.model_validate(entry["signal"])
            return cls(int(entry["epoch"]), int(entry["step"]), signal, dict(entry["state"]))
        except (KeyError, TypeError, ValidationError) as error:
            raise ValueError(f"not a decision: {error}") from error


class CommandLog:
    """The log of one run.

    Args:
        folder: the run's.
        fresh: forget what an earlier run left here; else it is read for replay.

    Raises:
        TamperedError: if a line other than the last is not a decision.
    """

    def __init__(self, folder: Storage, *, fresh: bool = False) -> None:
        self._folder = folder
        if fresh:
            folder.remove(FILE)
            folder.remove("commands")
        self._entries = {entry.epoch: entry for entry in self._read()}

    def at(self, epoch: int) -> LoggedDecision | None:
        """The decision taken at the end of `epoch`, if it was logged."""
        return self._entries.get(epoch)

    def append(self, decision: LoggedDecision) -> None:
        """Logs a decision; it is durable on return.

        Raises:
            ConflictError: if another decision is logged for this epoch: it must be replayed, not taken again.
        """
        if decision.epoch in self._entries:
            raise ConflictError(f"the decision of epoch {decision.epoch} is logged already")
        if self._folder.is_local:
            self._folder.append(FILE, decision.encode())
        else:
            self._folder.write(f"commands/epoch-{decision.epoch:06d}.json", decision.encode())
        self._entries[decision.epoch] = decision

    def _read(self) -> Iterator[LoggedDecision]:
        if not self._folder.is_local:
            for name in self._folder.names("commands"):
                yield self._decode(self._folder.read(f"commands/{name}"))
            return
        try:
            text = self._folder.read(FILE)
        except NotFoundError:
            return
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            self._folder.write(FILE, b"".join(lines))  # or the next line would be glued to the torn one
        for line in lines:
            yield self._decode(line)

    def _decode(self, line: bytes) -> LoggedDecision:
        try:
            return LoggedDecision.decode(line)
        except ValueError as error:
            raise TamperedError(f"{self._folder.shown}/{FILE}: {error}") from error
