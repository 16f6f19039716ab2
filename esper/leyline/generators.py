"""Random numbers that are drawn apart: hosts and data draw from torch, numpy and Python's `random` alike."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def drawn_apart(devices: Iterable[torch.device | int]) -> Iterator[None]:
    """Within it, random numbers of torch, numpy and Python are drawn from copies of their generators.

    Args:
        devices: GPUs that are drawn on; the CPU always is.
    """
    state, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the host may draw from it
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str), enabled=True):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)  # noqa: NPY002
