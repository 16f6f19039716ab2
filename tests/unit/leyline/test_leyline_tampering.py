"""Tampered containers: whatever was done to the bytes, they are refused with a reason before anything is loaded."""

from __future__ import annotations

import io
import stat
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from container_samples import (
    ATTRIBUTES,
    END,
    ENTRY,
    KEY,
    NATIVE,
    OFFSET,
    PUBLIC,
    SIZES,
    entries,
    manifest,
    packed,
    with_entry,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper.leyline import KernelRejectedError, Pipeline, TamperedError, compile_key, container
from esper.leyline.container import MANIFEST, SIGNATURE, WEIGHTS, pack, unpack

PACKED = packed()
REFUSED = (TamperedError, KernelRejectedError)


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Fails a test in which the weights of a container are read, unless it says that they are."""
    if "reads_weights" in request.keywords:
        return

    def forbidden(_body: bytes):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(safetensors.numpy, "load", forbidden)


def refused(data: bytes) -> str:
    """The reason, in words."""
    with pytest.raises(REFUSED) as caught:
        unpack(data, PUBLIC)
    assert caught.value.message
    return str(caught.value)


@pytest.mark.parametrize("bit", range(8))
def test_no_flipped_bit_gets_through_at_any_position(bit: int):
    for position in range(bit, len(PACKED), 8):  # each position in one of the eight
        data = bytearray(PACKED)
        data[position] ^= 1 << ((position + bit) % 8)
        refused(bytes(data))


@settings(max_examples=100)
@given(st.binary(max_size=400))
@example(b"")
@example(END.pack(b"PK\5\6", 0, 0, 0, 0, 0, 0, 0))
def test_no_other_bytes_get_through(data: bytes):
    refused(data)


@settings(max_examples=100)
@given(start=st.integers(0, len(PACKED)), length=st.integers(0, 64), new=st.binary(max_size=64))
def test_no_replaced_inserted_or_removed_stretch_gets_through(start: int, length: int, new: bytes):
    data = PACKED[:start] + new + PACKED[start + length :]
    if data != PACKED:
        refused(data)


def test_a_container_of_another_key_and_a_signature_of_another_container_are_refused():
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert "signature" in refused(packed(key=other))
    assert "signature" in refused(_with_member_of(packed(weight=2.0), SIGNATURE))


@pytest.mark.parametrize("name", [WEIGHTS, NATIVE])
def test_weights_and_code_of_another_signed_container_are_refused(name: str):
    """Both are genuine, and of the same size: only together they are not what was signed."""
    other = packed(weight=2.0, code=b"\x7fFLE")
    assert "does not match the manifest" in refused(_with_member_of(other, name))


@pytest.mark.parametrize("changes", [{"fingerprint": "elsewhere"}, {"pipeline": Pipeline.OPTIMIZED}])
def test_a_genuine_signature_over_a_build_that_its_key_does_not_name_is_refused(changes: dict):
    assert "key of this compilation" in refused(packed(**changes))


@pytest.mark.reads_weights
def test_a_genuine_container_of_another_build_says_so_in_its_manifest():
    """What runs its code compares this with itself; the container cannot lie about it without the signer."""
    key = compile_key(manifest().ir_hash, manifest().signature, Pipeline.FAST, "elsewhere")
    assert unpack(packed(fingerprint="elsewhere", compile_key=key), PUBLIC).manifest.fingerprint == "elsewhere"


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR])
@pytest.mark.parametrize("name", [WEIGHTS, NATIVE, MANIFEST])
def test_links_folders_and_devices_are_refused(name: str, kind: int):
    assert "more than its members" in refused(with_entry(PACKED, name, {ATTRIBUTES: (kind | 0o777) << 16}))


def test_members_that_share_bytes_are_refused():
    at = entries(PACKED)
    offset = ENTRY.unpack_from(PACKED, at[WEIGHTS])[OFFSET]
    refused(with_entry(PACKED, NATIVE, {OFFSET: offset}))
    # the same with a name that fits: twice the weights, one of them as code
    assert "more bytes than the container" in refused(_overlapping(number=40, size=len(PACKED) // 2))
    refused(_overlapping(number=2, size=len(PACKED) // 4))


@pytest.mark.parametrize("size", [1 << 20, (1 << 32) - 2, (1 << 32) - 1])
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, NATIVE])
def test_huge_declared_sizes_are_refused_without_the_memory_for_them(name: str, size: int):
    data = with_entry(PACKED, name, dict.fromkeys(SIZES, size))
    tracemalloc.start()
    try:
        refused(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_size_that_is_huge_only_when_inflated_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (MANIFEST, SIGNATURE, WEIGHTS):
            archive.writestr(name, bytes(64 << 20) if name == WEIGHTS else b"{}")
    assert len(buffer.getvalue()) < 1 << 20
    tracemalloc.start()
    try:
        assert "compressed" in refused(buffer.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [5, 65, 65_535])
def test_a_directory_of_many_entries_is_refused_unread(number: int):
    entry = ENTRY.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    directory = entry * 200_000
    data = directory + END.pack(b"PK\5\6", 0, 0, number, number, len(directory), 0, 0)
    tracemalloc.start()
    try:
        assert "above the limits" in refused(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_second_directory_cannot_be_smuggled_in():
    """`zipfile` prefers a 64-bit directory whose locator lies before the end record: here, inside the first one."""
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1)
    entry = ENTRY.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, len(locator), 0, 0, 0, 0, 0, 0) + locator
    data = entry + END.pack(b"PK\5\6", 0, 0, 1, 1, len(entry), 0, 0)
    assert "another one" in refused(data)


@pytest.mark.parametrize("name", ["../../etc/passwd", "payload/../../../x", "payload/cpu/..", "\\\\server\\x", "C:x"])
def test_paths_out_of_the_container_are_refused(name: str):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    assert "no member" in refused(buffer.getvalue())


def test_a_name_that_the_local_header_spells_otherwise_is_refused():
    """The directory says one name, the header in front of the bytes another."""
    position = PACKED.index(NATIVE.encode())
    refused(PACKED[:position] + NATIVE.replace("fw", "bw").encode() + PACKED[position + len(NATIVE) :])


@pytest.mark.reads_weights
@pytest.mark.parametrize("shape", [[1 << 40], [1 << 62, 4], [-1]])
def test_weights_that_declare_more_than_they_hold_are_refused_though_signed(shape: list[int], monkeypatch):
    header = f'{{"lin.weight":{{"dtype":"F32","shape":{shape},"data_offsets":[0,64]}}}}'.encode()
    body = struct.pack("<Q", len(header)) + header + bytes(64)
    monkeypatch.setattr(safetensors.numpy, "save", lambda _tensors: body)
    data = pack(manifest(), {"lin.weight": np.zeros(16, np.float32)}, KEY)
    assert "weights" in refused(data)


def _with_member_of(other: bytes, name: str) -> bytes:
    """PACKED with one member's bytes taken from another container; checksums and directory are made to fit."""
    with zipfile.ZipFile(io.BytesIO(PACKED)) as mine, zipfile.ZipFile(io.BytesIO(other)) as theirs:
        members = {one: (theirs if one == name else mine).read(one) for one in mine.namelist()}
    return container._zip(members)


def _overlapping(*, number: int, size: int) -> bytes:
    """`number` payloads that all are the same `size` bytes of one file."""
    body = PACKED[: min(entries(PACKED).values())]
    offset = ENTRY.unpack_from(PACKED, entries(PACKED)[MANIFEST])[OFFSET]
    names = [f"payload/cpu/{n}.so".encode() for n in range(number)]
    directory = b"".join(
        ENTRY.pack(b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, size, size, len(name), 0, 0, 0, 0, 0, offset) + name
        for name in names
    )
    return body + directory + END.pack(b"PK\5\6", 0, 0, number, number, len(directory), len(body), 0)
