"""An asset hub in memory: the same rules and the same catalog, events in a list, blobs in a dict."""

from __future__ import annotations

from collections.abc import Callable, Collection

from esper.leyline import Blueprint, Pipeline, SiteSignature, now
from esper.urza.blobs import MemoryBlobs
from esper.urza.catalog import OPEN
from esper.urza.events import MemoryLog
from esper.urza.hub import Hub


class MemoryHub(Hub):
    """An `AssetHub` for tests and for runs without a cluster that need nothing to last.

    Attributes:
        is_filled: nobody builds for it any more: whoever waits for what it does not have waits for ever.
    """

    is_filled = False

    def __init__(self, *, clock: Callable[[], float] = now) -> None:
        super().__init__(MemoryLog(clock), MemoryBlobs(clock), clock=clock)

    def unbuilt(self, signatures: Collection[SiteSignature]) -> list[str]:
        """Names of the designs that are still to be built from their IR for any of these sites."""
        return [blueprint.name for blueprint in self.blueprints() if self._is_unbuilt(blueprint, signatures)]

    def _is_unbuilt(self, blueprint: Blueprint, signatures: Collection[SiteSignature]) -> bool:
        targets = self.targets(blueprint.blueprint_id)
        return any(
            one.state in OPEN and one.pipeline is Pipeline.FAST and one.signature in signatures for one in targets
        )
