"""What Nissa tells when something is out of the ordinary: one alert a kind and place, from its begin to its end."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from esper.leyline.contract import API_VERSION, Contract, Finite
from esper.leyline.flags import AlertKind, Severity


class Alert(Contract):
    """One thing out of the ordinary, as last told; a later message of the same `alert_id` replaces it.

    Attributes:
        alert_id: the same in all that is told of one alert, also by a Nissa that was restarted and reads the log anew.
        severity: how grave. An alert never makes a trainer do anything.
        run_id: empty for one of the whole platform.
        site, seed_id, group: what it is about, where it is about one.
        since: when it began, seconds since the epoch, at the sender of the signal that showed it first.
        since_step: the run's step then.
        updated_at: when it was last seen.
        count: signals that showed it.
        summary: what happened, in a few words.
        evidence: the figures in a sentence.
        figures: the same by name, such as `value`, `usual` and `score`.
        detector: what saw it.
        command: a command line that helps to look into it or to end it.
        ended_at, ended_step: when it was over; None while it lasts.
        ending: why it is over.
    """

    api_version: int = API_VERSION
    alert_id: Annotated[str, Field(min_length=1)]
    kind: AlertKind
    severity: Severity = Severity.WARNING
    run_id: str = ""
    site: str | None = None
    seed_id: str | None = None
    group: str | None = None
    since: Finite
    since_step: Annotated[int, Field(ge=0)] | None = None
    updated_at: Finite
    count: Annotated[int, Field(ge=1)] = 1
    summary: Annotated[str, Field(min_length=1)]
    evidence: Annotated[str, Field(min_length=1)]
    figures: dict[str, Finite] = Field(default_factory=dict)
    detector: str
    command: Annotated[str, Field(min_length=1)]
    ended_at: Finite | None = None
    ended_step: Annotated[int, Field(ge=0)] | None = None
    ending: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it lasts."""
        return self.ended_at is None

    @property
    def place(self) -> str:
        """Where, in words: the site, else the group, else the run."""
        return self.site or self.group or self.run_id
