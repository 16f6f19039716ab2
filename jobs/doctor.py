"""`esper doctor`: what is here, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from esper.leyline import EsperError

PACKAGES = (
    "torch",
    "ray",
    "pydantic",
    "deltalake",
    "pyarrow",
    "fsspec",
    "s3fs",
    "safetensors",
    "cryptography",
    "plotly",
)


class Finding(NamedTuple):
    """One thing that was looked at. `state` is ok, optional (not here, and not needed for a first run) or missing."""

    name: str
    state: str
    detail: str
    remedy: str = ""


def versions() -> dict[str, str]:
    """Versions of Esper, Python and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("esper-morphogen", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def examine(storage: str) -> list[Finding]:
    """Looks at Python, packages, cores, memory, storage, token, ports, data, the GPU and the compiler."""
    return [
        _python(),
        *_packages(),
        _cores(),
        _memory(),
        _storage(storage),
        _token(),
        _loopback(),
        _data(),
        _gpu(),
        _compiler(),
    ]


def _python() -> Finding:
    good = (3, 11) <= sys.version_info < (3, 14)
    return Finding("python", "ok" if good else "missing", platform.python_version(), "" if good else "use 3.11 to 3.13")


def _packages() -> list[Finding]:
    findings = []
    for package, found in versions().items():
        if package in {"esper-morphogen", "python"}:
            continue
        here = found != "not installed"
        findings.append(Finding(package, "ok" if here else "missing", found, "" if here else "make install"))
    return findings


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", "ok", f"{cores}", "" if cores >= 2 else "two or more keep compilers off the trainer's core")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    good = total >= 4
    return Finding(
        "memory", "ok" if good else "missing", f"{total:.1f} GiB", "" if good else "the platform needs about 2 GiB"
    )


def _storage(storage: str) -> Finding:
    from esper.storage import Storage

    try:
        Storage.at(storage).check_writable()
    except EsperError as error:
        return Finding("storage", "missing", str(error), "give --storage, or set `storage` in the YAML")
    local = Path(storage).expanduser()
    if "://" in storage:
        return Finding("storage", "ok", f"{storage} is writable")
    free = shutil.disk_usage(local if local.exists() else local.parent).free / 2**30
    return Finding("storage", "ok", f"{storage} is writable, {free:.0f} GiB free")


def _token() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "token (set by esper)")
    path = Path.home() / ".ray" / "auth_token"
    if mode == "disabled":
        return Finding(
            "ray token", "optional", "RAY_AUTH_MODE=disabled", "unset it: anyone on this machine may run code"
        )
    if path.exists() and path.stat().st_mode & 0o077:
        return Finding("ray token", "missing", f"{path} can be read by others", f"chmod 600 {path}")
    return Finding("ray token", "ok", f"{mode}, {'private' if path.exists() else 'made on first start'}")


def _loopback() -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            return Finding("loopback", "missing", str(error), "Ray needs local sockets")
    return Finding("loopback", "ok", "local sockets open")


def _data() -> Finding:
    from jobs.environment import data_root

    root = data_root()
    if root is None:
        return Finding(
            "ESPER_DATA", "optional", "not set", "only configs other than digits need it: a folder of data sets"
        )
    sets = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
    return Finding("ESPER_DATA", "ok", f"{len(sets)} data sets: {', '.join(sets)}")


def _gpu() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("gpu", "optional", "torch is not installed")
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "optional", "none; training runs on the CPU")
    return Finding("gpu", "ok", torch.cuda.get_device_name())


def _compiler() -> Finding:
    """Whether native code (pipeline `optimized`) can be compiled here: tried, with what torch's Inductor would call."""
    name, compiler = "C++ compiler", os.environ.get("CXX", "g++")
    remedy = "only `optimized` kernels need it: apt-get install g++ binutils"
    missing = [program for program in (compiler, "strip") if shutil.which(program) is None]
    if missing:
        return Finding(name, "optional", f"no {' and no '.join(missing)}: no native code can be compiled here", remedy)
    with tempfile.TemporaryDirectory(prefix="esper-doctor-") as folder:
        command = [compiler, "-x", "c++", "-shared", "-fPIC", "-fopenmp", "-", "-o", f"{folder}/probe.so"]
        source = "#include <cmath>\n#include <vector>\ndouble probe(double x) { return std::exp(x); }\n"
        try:
            subprocess.run(command, input=source, check=True, capture_output=True, text=True, timeout=60)  # noqa: S603
        except subprocess.CalledProcessError as error:
            words = " ".join(error.stderr.split())[:200]
            return Finding(name, "optional", f"{compiler} does not compile: {words}", remedy)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding(name, "optional", f"{compiler} does not run: {error}", remedy)
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    return Finding(name, "ok", f"{(said.stdout or compiler).splitlines()[0]}: native code can be compiled here")
