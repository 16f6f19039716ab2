"""The state of a run between two steps as one blob, for its forks: safetensors, and JSON in the header. No pickle."""

from __future__ import annotations

import json
from typing import Any

import safetensors
import safetensors.torch

from esper.leyline.errors import TamperedError
from esper.tolaria import snapshot
from esper.tolaria.course import Course
from esper.tolaria.tree import flatten, unflatten


def pack(course: Course) -> bytes:
    """The state between two steps as one safetensors blob; everything but tensors is JSON in its header."""
    state = {
        "train": snapshot.take(course.growable, course.optimization),
        "epoch": course.epoch,
        "step": course.step,
    }
    tree, tensors = flatten(state)
    return safetensors.torch.save(tensors, metadata={"state": json.dumps(tree, separators=(",", ":"))})


def unpack(packed: bytes) -> dict[str, Any]:
    """Inverse of `pack`: `train`, `epoch` and `step`.

    Raises:
        TamperedError: if it is not whole.
    """
    try:
        header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
        tree = json.loads(header["__metadata__"]["state"])
        return unflatten(tree, safetensors.torch.load(packed))
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise TamperedError(f"the checkpoint of a fork is not whole: {error}") from error
