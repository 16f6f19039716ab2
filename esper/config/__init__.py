"""The configuration of a run: frozen pydantic models, read from YAML, then dotted overrides (`tolaria.epochs=2`).

A module a system, named as it is; `run` puts them together and `reading` reads them. Parsing needs neither torch nor
ray, so that `--help`, `--dry-run` errors and completion answer at once. What a key means is said where it stands;
defaults suit a laptop.
"""

from esper.config.data import Data, DigitsData, GivenData, ParquetImageData, SyntheticData, TextData
from esper.config.hosts import CnnHost, GivenHost, GptHost, Host, ImportedHost, MlpHost, ResNetHost, RunHost, VitHost
from esper.config.kasmina import KasminaConfig
from esper.config.nissa import NissaConfig, PageConfig
from esper.config.oona import OonaConfig
from esper.config.reading import dump_config, load_config, parse_config
from esper.config.run import Budget, RunConfig
from esper.config.section import PositiveFloat, PositiveInt, Section
from esper.config.simic import RewardConfig, SimicConfig
from esper.config.tamiyo import (
    BanditConfig,
    CanaryConfig,
    GnnConfig,
    ScheduledGraft,
    Strategy,
    TamiyoConfig,
    TrialsConfig,
)
from esper.config.tezzeret import TezzeretConfig
from esper.config.tolaria import GovernorConfig, OptimizerConfig, Optimizers, SchedulerConfig, TolariaConfig
from esper.config.urza import HttpConfig, UrzaConfig

__all__ = [
    "BanditConfig",
    "Budget",
    "CanaryConfig",
    "CnnHost",
    "Data",
    "DigitsData",
    "GivenData",
    "GivenHost",
    "GnnConfig",
    "GovernorConfig",
    "GptHost",
    "Host",
    "HttpConfig",
    "ImportedHost",
    "KasminaConfig",
    "MlpHost",
    "NissaConfig",
    "OonaConfig",
    "OptimizerConfig",
    "Optimizers",
    "PageConfig",
    "ParquetImageData",
    "PositiveFloat",
    "PositiveInt",
    "ResNetHost",
    "RewardConfig",
    "RunConfig",
    "RunHost",
    "ScheduledGraft",
    "SchedulerConfig",
    "Section",
    "SimicConfig",
    "Strategy",
    "SyntheticData",
    "TamiyoConfig",
    "TextData",
    "TezzeretConfig",
    "TolariaConfig",
    "TrialsConfig",
    "UrzaConfig",
    "VitHost",
    "dump_config",
    "load_config",
    "parse_config",
]
