"""The library's public face, and its composition root: here, and only here, the systems of `esper` are put together.

For people: `grow`, `wrap`, `export`, `Task`, `Run`, `Grown`. For the runtime (`actors/`) and for tests and benchmarks
without one: `train_local`, the one function that trains a workload in this process, and what prepares for it.
"""

from esper.api.checking import check_workload
from esper.api.growing import Run, grow
from esper.api.hosting import checkpoint_host
from esper.api.kernels import local_hub, local_hub_of, request_kernels
from esper.api.runtime import RUNTIME, RUNTIME_GROUP, RunResult, Runtime, WorkloadFactory, find_runtime, new_run_id
from esper.api.training import fork_local, train_local
from esper.api.workloads import configured_host, configured_workload
from esper.api.wrapping import Grown, export, wrap
from esper.tolaria.task import Task

__all__ = [
    "RUNTIME",
    "RUNTIME_GROUP",
    "Grown",
    "Run",
    "RunResult",
    "Runtime",
    "Task",
    "WorkloadFactory",
    "check_workload",
    "checkpoint_host",
    "configured_host",
    "configured_workload",
    "export",
    "find_runtime",
    "fork_local",
    "grow",
    "local_hub",
    "local_hub_of",
    "new_run_id",
    "request_kernels",
    "train_local",
    "wrap",
]
