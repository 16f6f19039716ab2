"""The first step of one kernel in a fresh process: `python -m jobs.bench.first_step FILE PUBLIC_KEY MODE`.

Prints milliseconds from the container's bytes to something that can be called, and of its first forward and backward.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from esper.kasmina.loader import build
from esper.leyline.container import unpack
from esper.leyline.runtime import NativeModule, open_native

BATCH = 32


def main(file: str, public_key: str, mode: str) -> None:
    """Loads the kernel the way `mode` says (`ir`, `native`, `torch_compile`), and takes one step."""
    torch.set_num_threads(1)
    data = Path(file).read_bytes()
    began = time.perf_counter()
    kernel = unpack(data, public_key)
    facts = kernel.manifest.native
    assert facts is not None
    module = build(kernel.manifest, kernel.weights)
    run = module
    if mode == "native":
        run = NativeModule(open_native(kernel.kernel_id, facts, kernel.payload), module)
    elif mode == "torch_compile":
        run = torch.compile(module, dynamic=True)
    loaded = time.perf_counter()
    h = torch.randn((max(BATCH, facts.min_batch), *facts.shape), requires_grad=True)
    run(h).sum().backward()
    print(json.dumps([1e3 * (loaded - began), 1e3 * (time.perf_counter() - loaded)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
