"""The build a kernel was made by: what its key depends on, and what native code of it must find again."""

from __future__ import annotations

from esper.leyline.target import target_here


def target_fingerprint(device: str = "cpu") -> str:
    """The build of this process, such as `torch-2.13.0+cpu-ab12cd34ef56-x86_64-AVX512-0a1b2c3d`.

    torch's version and git revision decide what an op computes; the machine and its instruction sets (the last part) or
    the GPU's architecture, CUDA and driver decide what native code may run. Nothing in it names a host, so equal
    machines share kernels.

    Raises:
        RuntimeError: if `device` is `cuda` and there is none.
    """
    return target_here(device).fingerprint
