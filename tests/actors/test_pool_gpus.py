"""The pool's workers for GPUs, on a Ray that believes in as many GPUs as it is told of, whatever is there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from urza_samples import VECTOR, design

from actors import oona, pool, urza
from actors.cluster import NAMESPACE, disconnect
from esper.config import OonaConfig, TezzeretConfig
from esper.leyline import Pipeline
from esper.storage import Storage

pytestmark = pytest.mark.ray

ON_GPU = VECTOR.model_copy(update={"device": "cuda"})
SHARE = 0.25
WAIT_S = 240.0


@pytest.fixture
def platform(request, tmp_path) -> Iterator[tuple[urza.UrzaHandle, object, Path]]:
    """A Ray with so many GPUs as the test asks for, an Urza, and a pool that has just started. Its workers
    for a GPU begin once there is a file at the gate.
    """
    ray.init(
        "local", namespace=NAMESPACE, num_cpus=2, num_gpus=request.param,
        include_dashboard=False, log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    address = str(tmp_path / "store")
    key = Storage.at(address).key
    bus = oona.spawn(OonaConfig(), tmp_path / "oona", prefix=f"oona-{key}")
    connect = lambda: oona.connect(f"oona-{key}").bus()  # noqa: E731 -- by value: workers cannot import this file
    hub = urza.spawn(address, make_bus=connect, num_cpus=0.01, deadline_s=240.0)

    folder = str(tmp_path)

    def builder(config, device):
        # what compiles for a GPU cannot start without one; this one makes no native code at all
        del config
        from esper.tezzeret.process import CompilerProcess

        while device != "cpu" and not (Path(folder) / "gate").exists():
            time.sleep(0.02)
        return CompilerProcess("esper.urabrask.gauntlet:examine")

    plan = pool.Plan(
        prefix=f"tezzeret-{key}",
        address=address,
        options={},
        config=TezzeretConfig(cpus_per_worker=0.01, max_workers=2, idle_s=5.0, gpus_per_worker=SHARE),
        make_bus=connect,
        private_key=lambda: Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
        builder=builder,
    )
    compilers = pool.spawn(f"compilers-{key}", plan, detached=False, every_s=0.2)
    yield hub, compilers, tmp_path / "gate"
    ray.get(compilers.stop.remote(), timeout=400)
    bus.stop()
    disconnect()


def until(holds, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"no {what} within {WAIT_S:g} s"
        time.sleep(0.05)


def workers(compilers, device: str) -> list[str]:
    names = ray.get(compilers.workers.remote(), timeout=60)
    return [name for name in names if f"-{device}-" in name]


def free_gpus() -> float:
    return ray.available_resources().get("GPU", 0.0)


@pytest.mark.parametrize("platform", [1], indirect=True)
def test_work_for_a_gpu_gets_a_worker_with_a_share_of_one_and_leaves_it_again(platform):
    hub, compilers, gate = platform
    until(lambda: workers(compilers, "cpu"), "worker")
    assert workers(compilers, "cuda") == []
    until(lambda: free_gpus() == 1.0, "report of the GPU")
    hub.submit_blueprint(design(3), name="fast", targets=[ON_GPU], pipelines=[Pipeline.FAST])
    until(lambda: hub.pending([ON_GPU]) == 0, "end of the fast work")
    assert workers(compilers, "cuda") == []  # what is only rebuilt from its IR needs no GPU
    blueprint = hub.submit_blueprint(design(4), name="native", targets=[ON_GPU], pipelines=[Pipeline.OPTIMIZED])
    until(lambda: free_gpus() == 1.0 - SHARE and len(workers(compilers, "cuda")) == 1, "worker with a share of the GPU")
    gate.touch()  # only now: it is let go of soon after its work
    until(lambda: hub.pending([ON_GPU]) == 0, "end of the work")
    assert "does not make optimized kernels" in hub.blueprint(blueprint.blueprint_id).reason
    until(lambda: workers(compilers, "cuda") == [], "shrinking")
    until(lambda: free_gpus() == 1.0, "return of the share")


@pytest.mark.parametrize("platform", [0], indirect=True)
def test_without_a_gpu_work_for_one_waits_and_no_worker_is_started_for_it(platform):
    hub, compilers, _ = platform
    hub.submit_blueprint(design(4), name="native", targets=[ON_GPU], pipelines=[Pipeline.OPTIMIZED])
    # compiled by the pool after it has seen the other work
    hub.submit_blueprint(design(3), name="fast", targets=[VECTOR], pipelines=[Pipeline.FAST])
    until(lambda: hub.pending([VECTOR]) == 0, "end of the fast work")
    assert hub.backlog().open("cuda") == 1
    assert workers(compilers, "cuda") == []
    assert len(workers(compilers, "cpu")) == 1
