"""The compile pool's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from esper.config.section import PositiveFloat, PositiveInt, Section
from esper.leyline.limits import IRLimits


class TezzeretConfig(Section):
    """The compile pool."""

    min_workers: Annotated[int, Field(ge=0)] = 1
    """Workers that stay without work."""
    max_workers: PositiveInt = 2
    """The pool grows to so many, for each device, while each would have seconds of work before it."""
    idle_s: PositiveFloat = 60.0
    """A worker beyond the least goes after so long without work."""
    cpus_per_worker: PositiveFloat = 0.2
    gpus_per_worker: PositiveFloat = 0.25
    """Share of a GPU that a worker asks for, where native code for CUDA is to be compiled."""
    lease_s: PositiveFloat = 60.0
    """A worker that is silent for so long loses its job to another; it renews the lease while it works."""
    job_timeout_s: PositiveFloat = 600.0
    """One job may run so long, pauses not counted; then its compiler is killed."""
    job_memory_mb: Annotated[int, Field(ge=512)] = 4096
    """Resident memory that a compiler and all it starts may take together; beyond it they are killed."""
    num_threads: PositiveInt = 1
    """Threads of a compiler."""
    yields: Literal["auto", "between_epochs", "never"] = "auto"
    """What a compiler does while a trainer takes steps on its cores. `auto`: it works where a core is left over, by
    measurement, else for `yield_share` of the time; `between_epochs`: it waits; `never`: it works on."""
    yield_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Of the time, where a trainer leaves no core: so that a compilation ends."""
    key_file: str = "~/.config/esper/signing_key.pem"
    """The signer's private key; made with mode 0600 where there is none. Compile nodes of a cluster share one."""
    optimize: Literal["auto", "grafted", "never"] = "auto"
    """Whether native code is compiled for kernels that a run has grafted; it takes the kernel's place once it is there
    and measured faster. `auto`: where the compilers have cores that the trainers do not use. Deterministic runs never
    do, since when it comes depends on the clock."""
    blueprints: Literal["library"] | tuple[str, ...] = "library"
    """Names from the library that are compiled for the run's sites, or all that fit."""
    limits: IRLimits = IRLimits()
    """What one kernel may cost; more is refused before it is built."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> TezzeretConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than max_workers {self.max_workers}")
        return self
