"""Maintenance that is killed in the middle: what it leaves reads the same, and the next round finishes it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from deltalake import DeltaTable
from urza_samples import compiled

from esper.leyline import NotFoundError
from esper.leyline.catalogue import KernelQuery
from esper.storage import Storage
from esper.urza import upkeep
from esper.urza.blobs import StoredBlobs
from esper.urza.hub import Hub
from esper.urza.reading import Reader

HOUR = 3600.0


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path / "store")


KILLED_AT = """
import os, sys
from deltalake import DeltaTable
from esper.storage import Storage
from esper.urza import hub, projections, upkeep

OWNERS = {"set_aside": hub.StoredBlobs, "discard": hub.StoredBlobs, "write_kernels": projections}

def maintain_until(place, when, address):
    owner = OWNERS.get(place, DeltaTable)
    original = getattr(owner, place)

    def die(*args, **kwargs):
        if when == "after":
            original(*args, **kwargs)
        os._exit(9)

    setattr(owner, place, die)
    opened = hub.Hub.open(Storage.at(address))
    opened.kernels()
    upkeep.maintain(opened, Storage.at(address), kept_hours=0.0, grace_hours=-1.0)

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            maintain_until(*line.rstrip("\\n").split("\\t"))
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed():
    """`killed(place, when, address)`: how a process ended that tidied there, to die at that place.

    Each is the fork of one that has imported Urza and done nothing yet: to import it anew takes most of 2 s.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", KILLED_AT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with server:

        def run(*words):
            server.stdin.write("\t".join(words) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.mark.parametrize(
    "place", ["create_checkpoint", "vacuum", "cleanup_metadata", "set_aside", "discard", "write_kernels"]
)
def test_killed_in_the_middle_it_leaves_an_address_that_reads_the_same(storage, place, killed):
    hub = Hub.open(storage)
    kernels = [compiled(hub, name) for name in ("one", "two")]
    blobs = StoredBlobs(storage)
    orphan, aside = blobs.put(b"orphan"), blobs.put(b"aside")
    [listed] = (blob for blob in blobs.stored() if blob.digest == aside)
    blobs.set_aside(listed, before=listed.written_at + HOUR)
    for when in ("before", "after"):
        assert killed(place, when, storage.uri) == 9
        assert [entry.kernel for entry in Reader.of(storage).search_kernels(KernelQuery()).kernels] == kernels
    after = Hub.open(storage)
    assert after.kernels() == kernels
    assert all(bytes(after.fetch(kernel.kernel_id)) for kernel in kernels)
    for _ in range(2):  # one round sets aside, the next removes
        upkeep.maintain(after, storage, kept_hours=0.0, grace_hours=-1.0)
    for digest in (orphan, aside):
        with pytest.raises(NotFoundError):
            blobs.get(digest)
    assert DeltaTable(storage.child("kernels")).to_pyarrow_table().num_rows == 2
