"""What Tamiyo makes of a run so far, for people and for policies: how the health of each site moved, which figures of
health told beforehand what growth was worth, and which alerts stand. Takes no decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from esper.leyline import FieldReport, SystemStatePacket
from esper.leyline.flags import AlertFlag
from esper.leyline.foresight import Foresight, foresights, pairs_of
from esper.tamiyo.memory import TamiyoState
from esper.tamiyo.windows import TREND_FEATURES, trend_features


@dataclass(frozen=True, slots=True)
class Analysis:
    """Of one run at one decision.

    Attributes:
        trends: by site, `windows.TREND_FEATURES` by name.
        foresights: how each figure of health at the choice goes with the value that came of it; of the run's own
            adaptations, and of earlier ones where they were given.
        alerts: Nissa's that stand, by site; those of the whole run under an empty name.
    """

    trends: dict[str, dict[str, float]]
    foresights: tuple[Foresight, ...]
    alerts: dict[str, tuple[AlertFlag, ...]]

    @property
    def best(self) -> Foresight | None:
        """The figure that goes with gains most surely: its interval is farthest from 0; None where none excludes it."""
        sure = [(away, one) for one in self.foresights if (away := _distance_from_zero(one)) > 0.0]
        return max(sure, key=lambda pair: pair[0])[1] if sure else None


def analyse(state: TamiyoState, packet: SystemStatePacket, *, earlier: Iterable[FieldReport] = ()) -> Analysis:
    """Returns what is known of the run.

    Args:
        state: after it has seen `packet`.
        packet: the current one; it carries the reports of all that ended in this run.
        earlier: reports of other runs, such as those that Urza keeps; one that is among the run's own counts once.
    """
    rows = trend_features(state.windows, packet).tolist()
    own = {report.report_id: report for report in (*earlier, *packet.ended)}
    places = dict.fromkeys((flag.site or "" for flag in packet.alerts), ())
    return Analysis(
        trends={
            layer.layer_id: dict(zip(TREND_FEATURES, row, strict=True))
            for layer, row in zip(packet.layers, rows, strict=True)
        },
        foresights=tuple(foresights(pairs_of(own.values()))),
        alerts={place: tuple(flag for flag in packet.alerts if (flag.site or "") == place) for place in places},
    )


def _distance_from_zero(one: Foresight) -> float:
    """Of the interval; 0 for one that holds 0, and for none."""
    return 0.0 if one.low is None or one.high is None else max(0.0, one.low, -one.high)
