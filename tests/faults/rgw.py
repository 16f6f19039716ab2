"""A real S3 server for tests: one node of Ceph (monitor, storage daemon, RADOS gateway) on loopback, all in memory.

From Debian: `apt-get install --no-install-recommends radosgw ceph-mon ceph-osd`. It starts in a few seconds.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from ports import free_ports

PROGRAMS = ("setpriv", "radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")
KEY, SECRET = "testkey", "testsecret"
START_S = 240.0

_CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = {run}
admin_socket = {run}/$name.asok
log_file = {run}/$name.log
pid_file = {run}/$name.pid
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
osd_crush_chooseleaf_type = 0
ms_bind_msgr1 = false
ms_mon_client_mode = crc secure
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_mon_report_interval = 1
mon_target_pg_per_osd = 400
mon_max_pg_per_osd = 1000
[mon]
mon_data = {root}/mon
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[osd]
osd_data = {root}/osd
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_op_num_shards = 2
[client]
keyring = {root}/keyring
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_data = {root}/rgw
rgw_enable_apis = s3, admin
rgw_thread_pool_size = 64
rgw_run_sync_thread = false
rgw_enable_quota_threads = false
rgw_relaxed_s3_bucket_names = true
"""
_KEYRING = '[mon.]\n key = AQBDm89hAAAAABAAoGZbZpmzPZZQyPMHAAAAAA==\n caps mon = "allow *"\n'


def missing() -> list[str]:
    """What would have to be installed first."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextlib.contextmanager
def serve(root: Path) -> Iterator[dict[str, str]]:
    """Runs a server; what it holds is gone when it ends.

    Args:
        root: an empty directory for its files; a short path, as it holds sockets.

    Yields:
        Its `storage_options`; there is no bucket yet.
    """
    folders = {name: root / name for name in ("mon", "osd", "rgw", "run")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    (root / "keyring").write_text(_KEYRING)
    config = root / "ceph.conf"
    port, mon = free_ports(2)
    fsid = str(uuid.uuid4())
    config.write_text(_CONFIG.format(fsid=fsid, port=port, mon=mon, root=root, run=folders["run"]))
    until = time.monotonic() + START_S
    with contextlib.ExitStack() as daemons:

        def run(program: str, *arguments: str | Path) -> str:
            command = [program, "-c", config, *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True, timeout=START_S).stdout

        def start(program: str, *arguments: str) -> None:
            daemons.enter_context(_daemon([program, "-c", str(config), *arguments, "-f"], root / f"{program}.out"))

        run("monmaptool", "--create", "--addv", "a", f"[v2:127.0.0.1:{mon}]", "--fsid", fsid, root / "monmap")
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", root / "monmap", "--keyring", root / "keyring")
        start("ceph-mon", "-i", "a")
        run("ceph", "osd", "new", osd := str(uuid.uuid4()))
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        start("ceph-osd", "-i", "0")
        while "1 up" not in run("ceph", "osd", "stat"):
            _wait(until, root)
        keys = (f"--access-key={KEY}", f"--secret-key={SECRET}")
        run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        start("radosgw", "-n", "client.admin")
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            _wait(until, root)
        yield {"endpoint_url": url, "key": KEY, "secret": SECRET, "region": "default"}


@contextlib.contextmanager
def _daemon(command: list[str], output: Path) -> Iterator[None]:
    until_killed = ["setpriv", "--pdeathsig", "KILL", "--"]  # it ends with this process, however that ends
    with output.open("w") as file:
        process = subprocess.Popen([*until_killed, *command], stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def _wait(until: float, root: Path) -> None:
    if time.monotonic() > until:
        raise TimeoutError(f"the S3 server did not start; see {root}")
    time.sleep(0.1)
