"""What a platform brings up on Ray Serve beside a run: it does not end with the driver, nor by what fails."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ports import free_ports
from ray import serve

from actors import serving
from actors.cluster import NAMESPACE, connected
from esper.config import HttpConfig, TamiyoConfig
from esper.storage import Storage

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]

DRIVER = """
import sys

from actors import serving
from actors.cluster import connected
from esper.config import HttpConfig, TamiyoConfig
from esper.storage import Storage

with connected():
    storage, port = Storage.at(sys.argv[1]), int(sys.argv[2])
    serving.deploy_beside(storage, HttpConfig(port=port) if port else None, TamiyoConfig(startup_s=240.0))
"""


@pytest.fixture(scope="module")
def own_ray():
    with connected(dashboard=False):
        yield ray.get_runtime_context().gcs_address


@pytest.fixture
def cluster(own_ray):
    """The address of a Ray without Serve."""
    yield own_ray
    serve.shutdown()


def drive(address: str, storage: Storage, port: int) -> None:
    """A driver that is gone before anything was deployed."""
    command = [sys.executable, "-c", DRIVER, storage.uri, str(port)]
    left = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert left.returncode == 0, left.stderr


def is_at_it(storage: Storage) -> bool:
    listed = ray.util.list_named_actors(all_namespaces=True)
    return {"name": f"serve-deploy-{storage.key}", "namespace": NAMESPACE} in listed


def states(storage: Storage) -> list[str]:
    return [application.state for application in serving.applications(storage)]


@contextlib.contextmanager
def held_up() -> Iterator[None]:
    """Serve gets no CPU for a replica meanwhile: on a quick machine all would be there before anybody has looked."""
    from ray.util import placement_group, remove_placement_group

    taken = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert ray.get(taken.ready(), timeout=240) is not None
    try:
        yield
    finally:
        remove_placement_group(taken)


def wait(storage: Storage) -> None:
    deadline = time.monotonic() + 400
    while is_at_it(storage):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_a_driver_began_is_finished_without_it(cluster, tmp_path):
    storage = Storage.at(tmp_path)
    with held_up():
        drive(cluster, storage, free_ports(1)[0])
        assert is_at_it(storage)
    wait(storage)
    assert states(storage) == ["running", "running"]


def test_tamiyo_comes_up_where_the_gateway_cannot(cluster, tmp_path):
    storage = Storage.at(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        drive(cluster, storage, taken.getsockname()[1])
        wait(storage)
    assert states(storage) == ["running", "absent"]


def test_a_gateway_without_a_token_is_told_of_and_left_out(cluster, tmp_path, caplog):
    storage = Storage.at(tmp_path)
    (tmp_path / "token").mkdir()
    http = HttpConfig(port=free_ports(1)[0], always_token=True, token_file=str(tmp_path / "token"))
    serving.deploy_beside(storage, http, TamiyoConfig(startup_s=240.0))
    assert "gateway.deploy.failed" in caplog.messages
    wait(storage)
    assert states(storage) == ["running", "absent"]


def test_it_can_be_given_up(cluster, tmp_path):
    storage = Storage.at(tmp_path)
    with held_up():
        serving.deploy_beside(storage, None, TamiyoConfig())
        assert is_at_it(storage)
        serving.give_up(storage)
        wait(storage)
    serving.give_up(storage)  # there is none any more
