"""For every suite: Ray reads its environment once, when it is first imported, whichever test file does that.

Ray starts its workers at niceness 15, below this process and all else on a busy machine. There an actor can wait
longer for a core than any deadline allows, and a test fails that says nothing about the actor.

Ray also gives its own raylet 30 s to come up, which no setting changes (2.60), and leaves all it had started where that
takes longer. Here it is waited for.
"""

import faulthandler
import gc
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import FrameType

import hypothesis
import pytest

from actors.cluster import prepare_environment

START_S = 240.0
"""The longest that a raylet may take to come up."""


def _patient(get_node: Callable[..., object]) -> Callable[..., object]:
    """Ray's look for its own node, which raises a `RuntimeError` where it is not there yet, asked again."""

    def ask(*args: object) -> object:
        until = time.monotonic() + START_S
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    return ask


if os.environ.get("ESPER_TEST_WITHOUT_RAY") != "1" and find_spec("ray") is not None:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    prepare_environment()
    from ray._private import services

    services.get_node = _patient(services.get_node)

# No example has a deadline: what a slow machine makes of it says nothing about the code.
# `CI` set: the same examples on every run. Elsewhere each run draws its own, and a failure prints how to repeat it.
hypothesis.settings.register_profile(
    "esper",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=25,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("esper")

EXIT_S = 60.0
"""The longest that this process may take to end once all is told."""
END_S = 30.0
"""The longest that a thread of ours may go on after the last test: one that was left to itself at a deadline ends."""


def pytest_collection_finish() -> None:
    """Takes what the imports have left out of the garbage collector's way: a full collection looks at all of it.

    With torch, pydantic and the tests loaded one takes a quarter of a second, and a session makes hundreds.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session if a test has left a thread of ours running.

    One that is inside Delta when the interpreter ends takes the process down with it, or holds it for good.
    """
    until = time.monotonic() + END_S
    while (left := _ours()) and time.monotonic() < until:
        time.sleep(0.1)
    for thread, frame in left.items():
        sys.stderr.write(f"\na test has left the thread {thread.name} running:\n")
        traceback.print_stack(frame, file=sys.stderr)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Shows where a process stands that does not end, and ends it."""
    faulthandler.dump_traceback_later(EXIT_S, exit=True)


def _ours() -> dict[threading.Thread, FrameType]:
    """Threads that run code of ours, and where each stands."""
    frames = sys._current_frames()
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    return {thread: frame for thread in others if _is_ours(frame := frames.get(thread.ident))}


def _is_ours(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] in {"esper", "actors", "jobs"}:
            return True
        frame = frame.f_back
    return False


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, str]]:
    """The `storage_options` of an S3 server on this machine with one bucket, `bucket`."""
    from moto.server import ThreadedMotoServer

    from esper.storage import Storage

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {"endpoint_url": f"http://{host}:{port}", "key": "key", "secret": "secret", "region": "eu-west-1"}
        Storage.at("s3://bucket", options).fs.mkdir("bucket")
        yield options
    finally:
        server.stop()
