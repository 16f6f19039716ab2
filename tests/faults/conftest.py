"""One Ray for a module of faults, and the runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.cluster import connected, prepare_environment

prepare_environment()

import chaos_plans  # noqa: E402 - Ray's environment comes first
import fault_support as support  # noqa: E402
from ray import cloudpickle  # noqa: E402

from actors import platform  # noqa: E402
from actors.launch import run  # noqa: E402
from esper.leyline import FaultPlan  # noqa: E402
from esper.storage import Storage  # noqa: E402

for module in (support, chaos_plans):
    cloudpickle.register_pickle_by_value(module)  # workers know no folder of tests


@pytest.fixture(scope="module")
def cluster():
    with connected(dashboard=True):
        yield


@pytest.fixture(scope="module")
def train(cluster):
    """Trains on the module's Ray: `train(storage, run_id, faults=None, resume=False, **settings)`.

    What is detached ends with the module, or when a run wants another platform: two of them and two workers are more
    than a small Ray has CPUs for.
    """
    storages = set()

    def start(storage: Path, run_id: str, faults: FaultPlan | None = None, *, resume: bool = False, **settings: object):
        config = support.config(storage, **settings)
        for other in storages - {config.storage}:
            platform.down(other)
        storages.clear()
        storages.add(config.storage)
        support.forget_watched()
        return run(support.WatchedWorkload(config), config, run_id=run_id, faults=faults, resume=resume)

    yield start
    for storage in storages:
        platform.down(storage)


@pytest.fixture(scope="module")
def quiet(train, tmp_path_factory):
    """The run that nobody disturbs, in a storage of its own."""
    storage = tmp_path_factory.mktemp("undisturbed")
    result = train(storage, "quiet")
    platform.down(str(storage))
    assert support.stages(result.summary) == support.STAGES
    return result


@pytest.fixture(scope="module")
def undisturbed(quiet):
    """The final weights of the run that nobody disturbs."""
    return support.final_weights(quiet.directory)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The storage, and so the platform, of the runs that are disturbed."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def key(shared):
    """What the names of the shared platform's actors carry."""
    return Storage.at(str(shared)).key
