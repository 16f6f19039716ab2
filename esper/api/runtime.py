"""What brings up the systems and trains, as the library sees it.

It is found through the entry point group `esper.runtime`, name `ray`; the object is a function

    run(workload_factory: Callable[[], Workload], config: RunConfig) -> RunResult

which brings up whatever it needs, calls `train_local` in its trainers and returns where the run lies.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points

from esper.config import RunConfig
from esper.leyline.errors import ConfigError
from esper.leyline.summary import RunSummary
from esper.tolaria.workload import Workload

RUNTIME_GROUP, RUNTIME = "esper.runtime", "ray"


@dataclass(frozen=True)
class RunResult:
    """What a runtime returns: where the run lies, and what it came to."""

    run_id: str
    directory: str
    summary: RunSummary


WorkloadFactory = Callable[[], Workload]
Runtime = Callable[[WorkloadFactory, RunConfig], RunResult]


def find_runtime() -> Runtime:
    """Returns the function that brings up the systems and trains; see the module.

    Raises:
        ConfigError: if none is installed, or it does not load.
    """
    found = next(iter(entry_points(group=RUNTIME_GROUP, name=RUNTIME)), None)
    if found is None:
        raise ConfigError(
            "no runtime is installed", field=RUNTIME_GROUP, remedy="install the distribution: pip install -e ."
        )
    try:
        return found.load()
    except ImportError as error:
        raise ConfigError(f"the runtime {found.value} does not load: {error}", field=RUNTIME_GROUP) from error


def new_run_id(config: RunConfig) -> str:
    """A name for a run: sorts by time, and does not repeat."""
    return f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
