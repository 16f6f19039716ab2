"""Random numbers of policies: the same for the same run, epoch and draws so far."""

from __future__ import annotations

import hashlib
import random

from esper.tamiyo.memory import TamiyoState


def generator(state: TamiyoState, number: int = 0) -> random.Random:
    """A generator that depends on the run's seed, the epoch and the draws so far, and on nothing else.

    Args:
        state: of the run.
        number: draws of this very proposal so far.
    """
    text = f"tamiyo/{state.seed}/{state.epoch}/{state.rng_counter + number}"
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))
