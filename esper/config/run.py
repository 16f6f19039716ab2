"""The whole configuration of a run, and what must fit together in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from esper.config.data import Data, DigitsData, GivenData, TextData
from esper.config.hosts import CnnHost, Host
from esper.config.kasmina import KasminaConfig
from esper.config.nissa import NissaConfig
from esper.config.oona import OonaConfig
from esper.config.section import PositiveFloat, Section
from esper.config.simic import SimicConfig
from esper.config.tamiyo import TamiyoConfig
from esper.config.tezzeret import TezzeretConfig
from esper.config.tolaria import TolariaConfig
from esper.config.urza import UrzaConfig


class Budget(Section):
    """Limits of growth, as factors of the host at the start; null is no limit."""

    params: PositiveFloat | None = 2.0
    flops: PositiveFloat | None = 2.0
    """Forward FLOPs of one sample."""


class RunConfig(Section):
    """Everything a run is determined by; the resolved form is saved with the run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,40}$")] = "run"
    """First part of the run id."""
    task: Literal["classification", "regression", "language_model", "custom"] = "classification"
    """`custom`: an `esper.Task` handed over in Python."""
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    deterministic: bool = False
    """Fixed threads and algorithms; the trainer waits for Tamiyo, kernels and storage; a resumed run is bit-equal."""
    storage: str = "~/.esper"
    """Directory, `file://` or `s3://` address of everything that must last."""
    storage_options: dict[str, Any] = Field(default_factory=dict)
    """Options of the storage driver, such as `endpoint_url` for S3."""
    data: Data = DigitsData()
    host: Host = CnnHost()
    budget: Budget = Budget()
    tolaria: TolariaConfig = TolariaConfig()
    kasmina: KasminaConfig = KasminaConfig()
    tamiyo: TamiyoConfig = TamiyoConfig()
    urza: UrzaConfig = UrzaConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    oona: OonaConfig = OonaConfig()
    nissa: NissaConfig = NissaConfig()
    simic: SimicConfig = SimicConfig()

    @model_validator(mode="after")
    def _replays_what_it_hears(self) -> RunConfig:
        if self.deterministic and self.tamiyo.control == "listen":
            raise ValueError("tamiyo.control: what a run hears depends on the clock, so a deterministic one must ask")
        return self

    @model_validator(mode="after")
    def _trials_fit(self) -> RunConfig:
        tamiyo = self.tamiyo
        if not tamiyo.trials.enabled:
            return self
        if self.deterministic:
            raise ValueError("tamiyo.trials: a deterministic run has none: when they end depends on the clock")
        if tamiyo.control == "listen":
            raise ValueError("tamiyo.trials: who watches the runs that listen is not told what their forks have shown")
        if self.tolaria.use_gpu:
            raise ValueError("tamiyo.trials: forks run on idle CPUs, and would not compute what a GPU does")
        if tamiyo.policy in {"none", "schedule"}:
            raise ValueError(f"tamiyo.trials: policy {tamiyo.policy} chooses nothing that could be tried")
        if tamiyo.strategy == "performance_linked" and not tamiyo.trials.strategies:
            raise ValueError(
                "tamiyo.trials: performance_linked goes by validations between epochs; name other strategies"
            )
        return self

    @model_validator(mode="after")
    def _task_fits_data(self) -> RunConfig:
        if isinstance(self.data, GivenData):
            return self
        is_text = isinstance(self.data, TextData)
        if is_text != (self.task == "language_model"):
            raise ValueError(f"task {self.task} does not go with data of type {self.data.type}")
        return self
