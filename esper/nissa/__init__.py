"""Nissa: what people see. Signals are folded into a small view model; views, logs and the report draw it.

Nissa decides nothing and never holds training up: a run without it goes on, and says so.
"""

from esper.nissa.follow import Follower, follow
from esper.nissa.live import Live
from esper.nissa.logs import bind, configure
from esper.nissa.outcome import outcome, table
from esper.nissa.report import write_report
from esper.nissa.terminal import LiveTerminal, PlainView, QuietView, View, view_for
from esper.nissa.viewmodel import LiveView, Note, Point, SeedView, Tone

__all__ = [
    "Follower",
    "Live",
    "LiveTerminal",
    "LiveView",
    "Note",
    "PlainView",
    "Point",
    "QuietView",
    "SeedView",
    "Tone",
    "View",
    "bind",
    "configure",
    "follow",
    "outcome",
    "table",
    "view_for",
    "write_report",
]
