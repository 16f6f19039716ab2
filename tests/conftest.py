"""For every suite: Ray reads its environment once, when it is first imported, whichever test file does that.

Ray starts its workers at niceness 15, below this process and all else on a busy machine. There an actor can wait
longer for a core than any deadline allows, and a test fails that says nothing about the actor.
"""

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from actors.cluster import prepare_environment

if os.environ.get("ESPER_TEST_WITHOUT_RAY") != "1" and find_spec("ray") is not None:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    prepare_environment()


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
