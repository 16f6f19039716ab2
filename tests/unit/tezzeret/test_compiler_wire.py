"""What a compiler process and its worker say to each other arrives as it was, or is refused."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from test_compile import job

from esper.tezzeret import wire
from esper.tezzeret.compile import Unsigned, build
from esper.urabrask.gauntlet import examine


def test_everything_of_a_kernel_travels():
    built = build(job(), fingerprint="here", examine=examine)
    payload = {"payload/x/forward.so": b"\x7fELF", "payload/x/meta.json": b""}
    built = Unsigned(built.manifest, {**built.weights, "none": np.zeros((0, 2))}, payload, built.report, 1.5)
    frames, got = wire.Frames(), []
    data = wire.encode(built) + wire.encode(wire.Ready(fingerprint="here"))
    for start in range(0, len(data), 777):
        got += frames.feed(data[start : start + 777])
    read, ready = got
    assert ready == wire.Ready(fingerprint="here")
    assert {field.name for field in fields(Unsigned)} == {"manifest", "weights", "payload", "report", "compile_s"}
    assert (read.manifest, read.payload, read.report, read.compile_s) == (
        built.manifest,
        payload,
        built.report,
        1.5,
    )
    assert {name: array.tobytes() for name, array in read.weights.items()} == {
        name: array.tobytes() for name, array in built.weights.items()
    }


@pytest.mark.parametrize("data", [b"\xff" * 12, b"\0" * 11 + b"\2" + b"{}", b"\0" * 7 + b"\x02" + b"\0\0\0\2" + b"{}"])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(ValueError):
        list(wire.Frames().feed(data))
