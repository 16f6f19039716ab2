"""The build a kernel was made by: what must match before native code of it may run, and what its key depends on."""

from __future__ import annotations

import platform
from functools import cache


@cache
def target_fingerprint() -> str:
    """The build of this process, such as `torch-2.13.0+cpu-ab12cd34ef56-x86_64-AVX512`.

    torch's version and git revision decide what an op computes; the machine and its vector units decide what native
    code may run. Nothing in it names a host, so equal machines share kernels.
    """
    import torch

    revision = str(torch.version.git_version)[:12]
    machine = platform.machine() or "unknown"
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
    return f"torch-{torch.__version__}-{revision}-{machine}-{capability}"
