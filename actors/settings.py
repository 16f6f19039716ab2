"""Settings of a Nissa that runs share: those of the run that started it hold, and the others hear of it."""

from __future__ import annotations

from typing import NamedTuple

from esper.config import PageConfig


class Settings(NamedTuple):
    """What a Nissa was started with; see `Nissa`."""

    metrics_every_s: float | None
    page: PageConfig | None
    otlp_endpoint: str | None

    def told_beside(self, wanted: Settings) -> tuple[str, ...]:
        """In words, where another run wanted others; an address of a collector is not repeated."""
        found = []
        if wanted.metrics_every_s != self.metrics_every_s:
            found.append(f"nissa.metrics_every_s stays {_or_none(self.metrics_every_s)}")
        if wanted.page != self.page:
            found.append("nissa.page stays as it is")
        if wanted.otlp_endpoint != self.otlp_endpoint:
            found.append("nissa.otlp_endpoint stays " + ("null" if self.otlp_endpoint is None else "another"))
        return tuple(found)


def _or_none(value: float | None) -> str:
    return "null" if value is None else f"{value:g}"
