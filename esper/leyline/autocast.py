"""What autocast must not keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Within it, autocast keeps no casts of weights.

    For forwards without gradients, or with detached weights, that may stand in somebody else's autocast region: a cast
    that they leave behind would serve that one's forward, whose own weights then silently get no gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
