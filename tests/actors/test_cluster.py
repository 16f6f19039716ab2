"""How a process leaves Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # some start Ray several times, and a busy machine takes a minute for one

LEAVES = """
import gc, sys, threading

import ray
from ray._private.worker import global_worker

from actors.cluster import connected

class Slow:
    '''Stands for the core worker: a ref becomes garbage as it ends, then another thread has its turn.'''

    def __init__(self, core_worker):
        self._core_worker = core_worker

    def __getattr__(self, name):
        return getattr(self._core_worker, name)

    def shutdown_driver(self):
        cycle = [refs.pop()]
        cycle.append(cycle)
        del cycle
        self._core_worker.shutdown_driver()
        thread = threading.Thread(target=lambda: [[] for _ in range(10_000)])  # the collector would run in it
        thread.start()
        thread.join()

with connected(dashboard=False):
    refs = [ray.put(0)]
    global_worker.core_worker = Slow(global_worker.core_worker)
print("here", gc.isenabled())
sys.exit(3)
"""


def test_a_ref_that_is_let_go_of_meanwhile_does_not_end_the_process():
    command = [sys.executable, "-c", LEAVES]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (left.returncode, left.stdout) == (3, "here True\n"), left.stderr


WITHOUT_A_DASHBOARD = """
import sys

sys.modules["ray.dashboard.optional_deps"] = None  # as where Ray was installed without its dashboard
from actors.cluster import connected

with connected(dashboard=True) as cluster:
    import ray

    print("owned", cluster.owned, ray.get(ray.put(7)))
"""


def test_without_the_parts_of_a_dashboard_ray_starts_all_the_same():
    command = [sys.executable, "-c", WITHOUT_A_DASHBOARD]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (left.returncode, left.stdout) == (0, "owned True 7\n"), left.stderr


SERVE_TWICE = """
import ray
from ray import serve

from actors import gateway
from actors.cluster import connected

with connected(dashboard=False):
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
    print(gateway.serve_runs())
with connected(dashboard=False):
    print(gateway.serve_runs())
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
ray.init(include_dashboard=False, log_to_driver=False)  # of the user's own, and left by Ray's own word
serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
ray.shutdown()
with connected(dashboard=False):
    print(gateway.serve_runs())
"""


def test_serve_of_an_earlier_ray_does_not_count_as_running():
    command = [sys.executable, "-c", SERVE_TWICE]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (left.returncode, left.stdout) == (0, "True\nFalse\nFalse\n"), left.stderr


DEPLOYING_AT_THE_END = """
import threading

from actors import gateway, tamiyo
from actors.cluster import connected
from esper.config import HttpConfig
from esper.leyline import EsperError
from esper.storage import Storage

begun, ended, told = threading.Event(), threading.Event(), []


def deploy():
    import ray

    begun.set()
    ended.wait(300.0)
    try:
        ray.get(ray.put(1))
    except Exception as error:
        told.append(type(error).__name__)
    told.append(ray.is_initialized())


with connected(dashboard=False):
    waiting = threading.Thread(target=lambda: tamiyo.within(60.0, deploy))
    waiting.start()
    begun.wait(60.0)
ended.set()
waiting.join(60.0)
print(*told)
for bring_up in (
    lambda: tamiyo.deploy(timeout_s=20.0),
    lambda: gateway.start_serve(HttpConfig(port=1), timeout_s=20.0),
    lambda: gateway.deploy(Storage.at("unused"), HttpConfig(), timeout_s=20.0),
):
    try:
        bring_up()
    except EsperError as error:
        print(error.message)
for thread in threading.enumerate():
    if thread.name == "ray-rests":
        thread.join(60.0)
from ray._private import auto_init_hook

print(auto_init_hook.enable_auto_connect)
"""


def test_what_is_deployed_as_ray_ends_starts_no_ray_of_its_own():
    command = [sys.executable, "-c", DEPLOYING_AT_THE_END]
    refused = "this process is not connected to Ray\n" * 3
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (left.returncode, left.stdout) == (0, f"RaySystemError False\n{refused}True\n"), left.stderr


CALLING_AT_THE_END = """
import threading
import time

import ray

from actors import cluster

told = []


@ray.remote(num_cpus=0, max_concurrency=8)
class Slow:
    def answer(self):
        time.sleep(0.05)


def ask(slow):
    try:
        while True:
            ray.get(slow.answer.remote())
    except Exception as error:
        told.append(str(error))


with cluster.connected(dashboard=False):
    slow = Slow.remote()
    ray.get(slow.answer.remote())
    threads = [threading.Thread(target=ask, args=[slow]) for _ in range(8)]
    for thread in threads:
        thread.start()
for thread in threads:
    thread.join(60.0)
print(sum(thread.is_alive() for thread in threads), len(told), *set(told))
with cluster.connected(dashboard=False):
    print(ray.get(ray.put("again")))
"""


def test_ray_is_left_when_nobody_is_at_a_call_of_it():
    command = [sys.executable, "-c", CALLING_AT_THE_END]
    left = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert left.returncode == 0, left.stderr
    assert left.stdout == "0 8 System error: this process is leaving Ray\nagain\n"
