"""Verified kernels that were fetched before, least recently used out first, bounded by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from esper.leyline.container import Kernel


class KernelCache:
    """Content-addressed, safe to use from several threads.

    Attributes:
        hits, misses: how often a kernel was here, and how often not.
        num_bytes: size of the containers held.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kernels: OrderedDict[str, tuple[Kernel, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._kernels)

    def __contains__(self, kernel_id: str) -> bool:
        return kernel_id in self._kernels

    @property
    def hit_rate(self) -> float | None:
        """Share of look-ups that found their kernel; None before the first."""
        total = self.hits + self.misses
        return self.hits / total if total else None

    def get(self, kernel_id: str, load: Callable[[], tuple[Kernel, int]]) -> Kernel:
        """Returns the kernel, by `load` if it is not here.

        Args:
            kernel_id: whose kernel.
            load: returns the verified kernel and the size of its container; what it raises passes through.
        """
        with self._lock:
            if kernel_id in self._kernels:
                self.hits += 1
                self._kernels.move_to_end(kernel_id)
                return self._kernels[kernel_id][0]
            self.misses += 1
        kernel, size = load()  # outside the lock: it may wait for the hub
        with self._lock:
            self._put(kernel_id, kernel, size)
        return kernel

    def resize(self, max_bytes: int) -> None:
        """Holds so many bytes at most from now on."""
        with self._lock:
            self._max_bytes = max_bytes
            self._shrink()

    def _put(self, kernel_id: str, kernel: Kernel, size: int) -> None:
        if size > self._max_bytes or kernel_id in self._kernels:
            return
        self._kernels[kernel_id] = (kernel, size)
        self.num_bytes += size
        self._shrink()

    def _shrink(self) -> None:
        while self.num_bytes > self._max_bytes:
            _, (_, dropped) = self._kernels.popitem(last=False)
            self.num_bytes -= dropped
