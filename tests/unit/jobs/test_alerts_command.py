"""`esper alerts`: the newest word of each alert that is kept on the bus."""

from __future__ import annotations

from esper.leyline import Alert, AlertKind
from esper.nissa.anomalies.outgoing import message_of
from esper.oona.memory import MemoryBus
from jobs.alerts import latest, lines


def alert(number, **changes):
    fields = {
        "alert_id": f"a{number}", "kind": AlertKind.DEAD_CHANNELS, "run_id": "run", "site": "blocks.0",
        "since": 1e9 + number, "since_step": 40, "updated_at": 1e9 + number, "summary": "channels die",
        "evidence": "80% of the channels are dead", "detector": "d", "command": "esper runs report run",
    }  # fmt: skip
    return Alert(**{**fields, **changes})


def test_the_newest_word_of_each_alert_counts():
    bus = MemoryBus()
    over = alert(1, count=3, ended_at=1e9 + 60, ending="10% again")
    try:
        bus.publish([message_of(a) for a in (alert(2), alert(1), alert(1, count=2), over, alert(2, count=4))])
        bus.flush()
        found = latest(bus)
    finally:
        bus.close()
    assert found == [over, alert(2, count=4)]
    text = "\n".join(lines(found))
    assert "warning: channels die (dead_channels) at blocks.0 of run since 2001-09-09 01:46:41, step 40" in text
    assert "80% of the channels are dead (seen 3 times, d); look: esper runs report run" in text
    assert text.count("over at") == 1
