"""Who builds a kernel: in another process (`process`), or here. Knows neither hub nor leases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from esper.leyline import BlueprintError, CompileJob, Fault, KernelRejectedError
from esper.leyline.limits import DEFAULT_LIMITS, IRLimits
from esper.tezzeret.compile import Examine, Unsigned, build
from esper.tezzeret.wire import Broken, Refused

Verdict = Unsigned | Refused | Broken
"""What became of a job: a kernel, a blueprint at fault, or a compiler that failed."""


class Builder(Protocol):
    """Turns jobs into kernels that nobody has signed yet."""

    def fingerprint(self) -> str:
        """The build of what compiles."""
        ...

    def build(self, job: CompileJob, tick: Callable[[], None]) -> Verdict:
        """Sees one job through.

        Args:
            job: what to build.
            tick: called while it is under way, where that is possible; what it raises ends the work, and is raised.

        Raises:
            UnavailableError: if nothing can be built here just now; the job is not at fault.
        """
        ...

    def close(self) -> None:
        """Lets go of what it holds."""
        ...


class InProcess:
    """Builds in the caller's own process and thread: for runs without a platform, and for tests.

    Args:
        examine: Urabrask's gauntlet.
        limits: what one kernel may cost.
    """

    def __init__(self, examine: Examine, limits: IRLimits = DEFAULT_LIMITS) -> None:
        self._examine = examine
        self._limits = limits

    def fingerprint(self) -> str:
        from esper.tezzeret.fingerprint import target_fingerprint

        return target_fingerprint()

    def build(self, job: CompileJob, tick: Callable[[], None]) -> Verdict:
        del tick
        try:
            return build(job, fingerprint=self.fingerprint(), examine=self._examine, limits=self._limits)
        except (BlueprintError, KernelRejectedError) as error:
            return Refused(reason=str(error))
        except RuntimeError as error:  # torch's own refusal, such as no memory for the weights
            return Broken(fault=Fault.ERROR, reason=f"torch: {' '.join(str(error).split())[:300]}")

    def close(self) -> None:
        """There is nothing to let go of."""
