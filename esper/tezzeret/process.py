"""A compiler in a process of its own, as its worker sees it: orders in, verdicts out, limits held, and never a crash.

The process is started by `exec`, with an environment that holds no credentials, in a session and process group of its
own: what it starts (a C++ compiler) counts to its limits and ends with it. It is kept for many jobs, for its imports
take seconds and a fast job milliseconds, and replaced after a crash or a limit.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from esper.leyline import CompileJob, Fault, Pipeline, UnavailableError
from esper.leyline.limits import DEFAULT_LIMITS, IRLimits
from esper.tezzeret import wire
from esper.tezzeret.builder import Verdict
from esper.tezzeret.child import Settings
from esper.tezzeret.compile import Unsigned
from esper.tezzeret.scratch import Scratch, environment

LOG_BYTES = 8_192
"""The end of what a compiler wrote that is kept."""
START_S = 180.0
"""A process that has not said by then that it is ready never will."""
JOBS_A_PROCESS = 200
"""After so many a process is replaced: what leaks in a compiler must not add up."""

_TICK_S = 0.1
_MEMORY_EVERY_S = 0.25
_KEPT = frozenset(
    {"PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "USER", "LOGNAME", "VIRTUAL_ENV"}
    | {"CC", "CXX", "CPATH", "LIBRARY_PATH", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH"}
    | {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
)
_KEPT_PREFIXES = ("TORCHINDUCTOR_", "TRITON_")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one job may take.

    Attributes:
        timeout_s: seconds, without those for which it was paused.
        memory_mb: resident memory of the process and all that it started, together.
    """

    timeout_s: float = 600.0
    memory_mb: int = 4096


def always(_pipeline: Pipeline) -> bool:
    """The pace of a compiler that has its cores to itself."""
    return True


class CompilerProcess:
    """A `Builder` in another process. For one thread at a time; `close` may come from any.

    Args:
        examine: Urabrask's gauntlet, as `module:function`; it is imported in the process.
        examine_native: its judgement of native code, likewise; None: only FAST kernels are made.
        device: what is compiled for.
        limits: of each job.
        ir_limits: what one kernel may cost.
        num_threads: of torch in the process.
        may_run: asked many times a second while a job is under way, of its pipeline: while it says no, the process is
            stopped.
    """

    def __init__(
        self,
        examine: str,
        *,
        examine_native: str | None = None,
        device: str = "cpu",
        limits: Limits = Limits(),
        ir_limits: IRLimits = DEFAULT_LIMITS,
        num_threads: int = 1,
        may_run: Callable[[Pipeline], bool] = always,
    ) -> None:
        self._examine = examine
        self._examine_native = examine_native
        self._device = device
        self._limits = limits
        self._ir_limits = ir_limits
        self._num_threads = num_threads
        self.may_run = may_run
        self._child: _Child | None = None
        self._fingerprint: str | None = None
        self._num_jobs = 0

    def family(self) -> list[int]:
        """The process and all that it started."""
        child = self._child
        return [] if child is None else _family(child.pid)

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return None if self._child is None else self._child.pid

    def fingerprint(self) -> str:
        """The process's build; starts one where it is not known yet. Raises `UnavailableError` if that fails."""
        if self._fingerprint is None:
            self._ready()
        assert self._fingerprint is not None
        return self._fingerprint

    def build(self, job: CompileJob, tick: Callable[[], None]) -> Verdict:
        """See `Builder`. The reason of a crash is how the process ended; the log, what it wrote last."""
        child = self._ready()
        try:
            verdict = self._follow(child, job, tick)
        except BaseException:
            self.close()  # nobody wants its answer any more
            raise
        self._num_jobs += 1
        if self._child is not None and self._num_jobs >= JOBS_A_PROCESS:
            self.close()
        return verdict

    def close(self) -> None:
        """Ends the process, if there is one; the next job starts another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()

    def _ready(self) -> _Child:
        """A process that waits for orders."""
        if self._child is not None and self._child.exit_code() is None:
            return self._child
        self.close()
        settings = Settings(
            examine=self._examine,
            examine_native=self._examine_native,
            device=self._device,
            memory_mb=self._limits.memory_mb if self._device == "cpu" else None,  # CUDA reserves far more than it uses
            num_threads=self._num_threads,
            limits=self._ir_limits,
            parent=os.getpid(),
        )
        self._child = child = _Child(settings)
        self._num_jobs = 0
        deadline = time.monotonic() + START_S
        while True:
            answer = child.poll(_TICK_S)
            if isinstance(answer, wire.Ready):
                self._fingerprint = answer.fingerprint
                return child
            code = child.exit_code()
            if answer is not None or code is not None or time.monotonic() > deadline:
                how = "did not start" if code is None else _ended(code)
                self.close()
                raise UnavailableError(f"the compiler {how}: {child.log()[-500:]}")

    def _follow(self, child: _Child, job: CompileJob, tick: Callable[[], None]) -> Verdict:
        """Waits for the answer, and holds the limits meanwhile."""
        child.order(wire.Order(job=job, fingerprint=self.fingerprint()))
        begin = time.monotonic()
        looked, paused_s = begin, 0.0
        while True:
            answer = child.poll(_TICK_S)
            if isinstance(answer, Unsigned):
                return answer
            if isinstance(answer, wire.Refused | wire.Broken):
                return answer.model_copy(update={"log": child.log()})
            now = time.monotonic()
            if child.is_paused:
                paused_s += now - looked
            looked = now
            code = child.exit_code()
            if code is not None:
                return self._died(child, _ended(code))
            if child.problem:
                return self._died(child, child.problem)
            if now - begin - paused_s > self._limits.timeout_s:
                return self._died(child, f"took longer than {self._limits.timeout_s:g} s")
            if child.resident_mb() > self._limits.memory_mb:
                return self._died(child, f"took more than {self._limits.memory_mb} MB")
            tick()
            child.pause(not self.may_run(job.pipeline))

    def _died(self, child: _Child, how: str) -> wire.Broken:
        self.close()  # what it started may still run
        return wire.Broken(fault=Fault.DEATH, reason=f"the compiler {how}", log=child.log())


class _Child:
    """One process: its pipes, its log, its group."""

    def __init__(self, settings: Settings) -> None:
        self._scratch = Scratch()
        self._process = subprocess.Popen(  # noqa: S603 -- this very interpreter and a module of this package
            [sys.executable, "-m", "esper.tezzeret.child", settings.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._scratch.path,
            env=_environment(self._scratch.path, settings.num_threads),
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.is_paused = False
        self.problem = ""
        self._log = bytearray()
        self._frames = wire.Frames()
        self._measured = (0.0, 0)
        self._selector = selectors.DefaultSelector()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)

    def order(self, order: wire.Order) -> None:
        """Hands a job over. A process that has just died is seen by who waits for the answer."""
        self._log.clear()
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.write(wire.encode(order))
            pipe.flush()

    def poll(self, timeout_s: float) -> wire.Message | None:
        """Reads what has come: a message, if one is whole; keeps the end of the log."""
        message = None
        for key, _ in self._selector.select(timeout_s):
            data = os.read(key.fd, 1 << 20)
            if not data:
                self._selector.unregister(key.fileobj)
            elif key.fileobj is self._process.stderr:
                self._log += data
                del self._log[:-LOG_BYTES]
            else:
                message = self._decoded(data) or message
        return message

    def _decoded(self, data: bytes) -> wire.Message | None:
        try:
            return next(iter(list(self._frames.feed(data))), None)
        except ValueError as error:
            self.problem = f"gave an answer that cannot be read: {' '.join(str(error).split())[:200]}"
            return None

    def exit_code(self) -> int | None:
        """As of `subprocess`: negative for a signal; None while it runs."""
        return self._process.poll()

    def pause(self, wanted: bool) -> None:
        """Stops the whole group, or lets it go on."""
        if wanted is not self.is_paused:
            self.is_paused = wanted
            self._signal(signal.SIGSTOP if wanted else signal.SIGCONT)

    def log(self) -> str:
        """The last lines, whatever bytes they were."""
        while self._selector.get_map() and self._selector.select(0.0):
            self.poll(0.0)
        return self._log.decode(errors="replace")

    def resident_mb(self) -> float:
        """Resident memory of the process and all it started; measured a few times a second."""
        at, value = self._measured
        if time.monotonic() - at >= _MEMORY_EVERY_S:
            value = sum(map(_resident_bytes, _family(self.pid)))
            self._measured = (time.monotonic(), value)
        return value / (1 << 20)

    def kill(self) -> None:
        """Ends the whole group."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.log()
        self._selector.close()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self._scratch.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _environment(scratch: Path, num_threads: int) -> dict[str, str]:
    """What a compiler needs, and none of what its worker may do."""
    kept = {name: text for name, text in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if Path(entry or ".").exists())
    return {
        **kept,
        **environment(scratch),
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
    }


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (", as by a system that is out of memory" if name == "SIGKILL" else "")


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    found, at = [pid], 0
    while at < len(found):
        for path in Path(f"/proc/{found[at]}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, path.read_text().split())
        at += 1
    return found


def _resident_bytes(pid: int) -> int:
    with suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
