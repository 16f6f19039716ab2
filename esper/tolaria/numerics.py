"""Seeds, threads and algorithms: what must be pinned so that a run can be repeated."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def numerics(*, seed: int, deterministic: bool, num_threads: int) -> Iterator[None]:
    """Seeds all generators and sets threads; in deterministic mode also forbids algorithms that vary.

    On leaving, threads and algorithms are as before: in-process mode shares the process with the user's code.
    """
    threads = torch.get_num_threads()
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.set_num_threads(num_threads)
    if deterministic:
        if torch.cuda.is_available():
            # cuBLAS reads it when its first handle is made; without it torch refuses matmul in this mode
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_everything(seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - users' transforms draw from the global generator
    random.seed(seed)


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns a short hash of each tensor's bytes: equal where, and for all that matters only where, the bits are."""
    return {name: hashlib.sha256(memoryview(_bytes(tensor))).hexdigest()[:16] for name, tensor in tensors.items()}


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def rng_state() -> dict[str, Any]:
    """Returns the state of all generators as JSON values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - see `seed_everything`
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "words": list(words), "gauss_next": gauss_next},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`. Generators of devices that are not here are left alone."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
    numpy = state["numpy"]
    np.random.set_state(  # noqa: NPY002 - see `seed_everything`
        (numpy["name"], numpy["keys"].numpy().astype(np.uint32), numpy["position"], numpy["has_gauss"], numpy["gauss"])
    )
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss_next"]))
