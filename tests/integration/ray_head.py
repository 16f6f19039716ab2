"""A Ray head of its own for tests: other ports, another token, and an end that touches no other Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ports import free_ports

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_MARK = "ESPER_TEST_HEAD"


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: of the cluster, for `RAY_ADDRESS`.
        dashboard: address of the dashboard, where jobs are submitted.
        environment: of whoever speaks with it; holds its token.
        log: what it printed.
    """

    address: str
    dashboard: str
    environment: Mapping[str, str]
    log: Path

    def run(
        self, *command: str | Path, timeout_s: float = 400.0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command of the environment's `bin` beside the head, joined to it unless `environment` says else."""
        name, *arguments = command
        return subprocess.run(
            [BIN / name, *arguments], env={**self.environment, **environment}, cwd=REPOSITORY, check=False,
            capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip


@contextlib.contextmanager
def head(*, num_cpus: int = 2) -> Iterator[Head]:
    """Starts a head with token authentication; whatever happens it is gone at the end, its workers with it."""
    folder = Path(tempfile.mkdtemp(prefix="esper-ray-", dir="/tmp"))
    mark = secrets.token_hex(8)
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    gcs, dashboard, client, agent = free_ports(4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # 3 by default; on a busy machine that is a matter of luck
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        _MARK: mark,
    }
    command = [
        BIN / "ray", "start", "--head", "--block", "--disable-usage-stats",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", f"--num-cpus={num_cpus}", f"--temp-dir={folder}",
        "--include-dashboard=true",
    ]  # fmt: skip
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        joined = environment | {"RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_API_SERVER_ADDRESS": url}
        started = Head(f"127.0.0.1:{gcs}", url, joined, log)
        wait_for(lambda: "Ray runtime started" in log.read_text(), f"the head of {log} to start")
        wait_for(lambda: _listens(dashboard), f"the dashboard on port {dashboard}")
        yield started
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(ask: Callable[[], T | None], what: str, *, timeout_s: float = 300.0) -> T:
    """Returns the first true answer.

    Raises:
        TimeoutError: if there is none within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.05)
    return answer


def _marked(mark: str) -> list[int]:
    """Processes that descend from a head, by what stands in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
