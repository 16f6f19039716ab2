"""What native code is built for: one processor or one kind of GPU. Who builds and who loads ask the same questions.

A CPU target is met by any machine of its kind whose instruction sets include those of the builder; a CUDA target by the
same compute capability, CUDA release and driver branch. torch must be the very same build: native code calls its
internals.
"""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from esper.leyline.contract import Contract

_CPUINFO = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia/version")
_CODE_FLAGS = re.compile(
    r"^(sse|ssse|avx|amx|fma|f16c|bmi|popcnt|abm|lzcnt|movbe|cx16|aes|pclmul|gfni|vaes|vpclmul|sha)"
)
"""Of the flags of an x86 processor those that name instructions a compiler may use: the rest say how it is managed."""


class Target(Contract):
    """A build of torch on a kind of machine.

    Attributes:
        device: `cpu` or `cuda`.
        torch: its version, such as `2.13.0+cpu`.
        revision: its git revision, 12 digits.
        machine: such as `x86_64`.
        capability: the vector units that torch uses (`AVX512`), or the GPU's architecture (`sm_90`).
        cpu_flags: instruction sets of the processor, sorted; empty for a GPU.
        cuda: release of CUDA and branch of the driver, such as `13.0-580`; empty for a CPU.
    """

    device: Literal["cpu", "cuda"]
    torch: str
    revision: str
    machine: str
    capability: str
    cpu_flags: tuple[Annotated[str, Field(max_length=64)], ...] = ()
    cuda: str = ""

    @property
    def name(self) -> str:
        """The folder of its payload, such as `cpu-x86_64-avx512`."""
        parts = (self.device, self.machine, self.capability)
        return re.sub(r"[^a-z0-9_\-]", "_", "-".join(parts).lower())[:64]

    @property
    def fingerprint(self) -> str:
        """All of it in one word, such as `torch-2.13.0+cpu-ab12cd34ef56-x86_64-AVX512-0a1b2c3d`."""
        units = hashlib.sha256(" ".join(self.cpu_flags).encode()).hexdigest()[:8] if self.cpu_flags else self.cuda
        parts = ("torch", self.torch, self.revision, self.machine, self.capability, units)
        return "-".join(part for part in parts if part)

    def misfit(self, here: Target) -> str | None:
        """Why code for this target must not run `here`; None if it may."""
        for field in ("device", "torch", "revision", "machine", "cuda"):
            wanted, found = getattr(self, field), getattr(here, field)
            if wanted != found:
                return f"it was built for {field} {wanted or 'none'}, this is {found or 'none'}"
        if self.device == "cuda":
            return (
                None
                if self.capability == here.capability
                else f"it was built for {self.capability}, not {here.capability}"
            )
        missing = sorted(set(self.cpu_flags) - set(here.cpu_flags))
        return f"this processor lacks {', '.join(missing[:8])}" if missing else None


@cache
def target_here(device: str = "cpu") -> Target:
    """The target that this process is; nothing in it names a host, so equal machines share kernels.

    Raises:
        RuntimeError: if `device` is `cuda` and there is none.
    """
    import torch

    version, revision = str(torch.__version__), str(torch.version.git_version)[:12]
    machine = platform.machine() or "unknown"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("there is no CUDA device here")
        major, minor = torch.cuda.get_device_capability()
        return Target(
            device="cuda",
            torch=version,
            revision=revision,
            machine=machine,
            capability=f"sm_{major}{minor}",
            cuda=f"{torch.version.cuda}-{_driver_branch()}",
        )
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
    return Target(
        device="cpu",
        torch=version,
        revision=revision,
        machine=machine,
        capability=capability,
        cpu_flags=_cpu_flags(),
    )


def _cpu_flags() -> tuple[str, ...]:
    """The instruction sets of this processor; empty where the system does not tell, and then nothing is shared."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return tuple(sorted(flag for flag in set(value.split()) if _CODE_FLAGS.match(flag)))
        if name.strip() == "Features":  # aarch64: every one of them names instructions
            return tuple(sorted(set(value.split())))
    return ()


def _driver_branch() -> str:
    """The first number of the NVIDIA driver's version."""
    try:
        found = re.search(r"Kernel Module\D*(\d+)\.", _DRIVER.read_text())
    except OSError:
        return "unknown"
    return found.group(1) if found else "unknown"
