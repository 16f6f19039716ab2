"""For every suite: Ray reads its environment once, when it is first imported, whichever test file does that.

Ray starts its workers at niceness 15, below this process and all else on a busy machine. There an actor can wait
longer for a core than any deadline allows, and a test fails that says nothing about the actor.
"""

import atexit
import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from coverage import Coverage

from actors.cluster import prepare_environment

if os.environ.get("ESPER_TEST_WITHOUT_RAY") != "1" and find_spec("ray") is not None:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    prepare_environment()

EXIT_S = 60.0
"""The longest that this process may take to end once all is told."""

_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends a process that has had Ray in it, with the tests' own verdict.

    Ray, gRPC and Delta leave native threads behind, and such a process has been seen to stand for an hour after its
    last test, in the interpreter's own finalization. So what is to be done at exit is done here, by a deadline: what
    hangs is shown with the stacks, and does not take the verdict with it. That Esper's programs end by themselves is
    seen in the tests that start them as processes. A thread of ours that would keep a process alive is a failure.
    """
    if "ray" not in sys.modules or _STATUS not in config.stash or hasattr(config, "workerinput"):
        return
    status = config.stash[_STATUS]
    kept_alive_by = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
    if kept_alive_by:
        sys.stderr.write(f"threads that would keep this process alive: {', '.join(kept_alive_by)}\n")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        status = status or int(pytest.ExitCode.TESTS_FAILED)
    if measured := Coverage.current():  # `coverage run` would save after us
        measured.stop()
        measured.save()
    ending = threading.Thread(target=atexit._run_exitfuncs, name="exit", daemon=True)
    ending.start()
    ending.join(EXIT_S)
    if ending.is_alive():
        sys.stderr.write(f"what is done at exit has not ended in {EXIT_S:.0f} s:\n")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
