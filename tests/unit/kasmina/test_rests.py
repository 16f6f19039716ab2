"""Rests of the loader: how long, and where."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from native_samples import native_of

from esper.kasmina import rests
from esper.kasmina.native import _try
from esper.kasmina.rests import FACTOR, LONGEST_S, Rests
from esper.kasmina.warm_up import warm_up
from esper.leyline import SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.urza.library import load_library

SITE = SiteSignature(kind=SiteKind.VECTOR, channels=6)
MODULE = lower(load_library()["mlp_adapter"].ir, SITE)


@pytest.fixture
def clock(monkeypatch):
    """This thread's processor seconds so far (settable), and the naps."""

    class Clock:
        used = 7.0
        naps: list[float] = []  # noqa: RUF012 - of one test

    # of this module alone: threads of other tests may sleep meanwhile
    monkeypatch.setattr(rests, "time", SimpleNamespace(thread_time=lambda: Clock.used, sleep=Clock.naps.append))
    return Clock


def test_a_rest_is_in_proportion_to_the_work_since_the_last_and_never_long(clock):
    rest = Rests()
    for worked in (0.004, 0.0, 0.01, 60.0):
        clock.used += worked
        rest()
    assert clock.naps == pytest.approx([FACTOR * 0.004, 0.0, FACTOR * 0.01, LONGEST_S])


def test_trials_are_in_pieces():
    num_rests = []
    _try(native_of(MODULE, SITE), MODULE, torch.device("cpu"), lambda: num_rests.append(threading.get_ident()))
    in_trial = len(num_rests)
    assert in_trial >= 4
    warm_up(MODULE, 1 << 20, SITE, torch.device("cpu"), rest=lambda: num_rests.append(threading.get_ident()))
    assert len(num_rests) - in_trial >= 3
