"""The signed container: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from container_samples import IR, KEY, PUBLIC, manifest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline import (
    ConfigError,
    KernelRejectedError,
    SafetyError,
    TamperedError,
    container,
    keys,
)
from esper.leyline.container import pack, unpack

WEIGHTS = {"lin.weight": np.arange(16, dtype=np.float32).reshape(4, 4), "lin.bias": np.zeros(4, np.float32)}
NATIVE = {"payload/cpu-avx512/fw.so": b"\x7fELF"}


PACKED = pack(manifest(), WEIGHTS, KEY, payload=NATIVE)


def members(data: bytes = PACKED) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(parts: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, body in parts:
            archive.writestr(zipfile.ZipInfo(name), body, compress_type=compression)
    return buffer.getvalue()


def test_what_goes_in_comes_out():
    kernel = unpack(memoryview(PACKED), PUBLIC)
    assert kernel.kernel_id == container.kernel_id_of(PACKED)
    assert kernel.manifest.model_copy(update={"members": {}}) == manifest()
    assert kernel.weights.keys() == WEIGHTS.keys()
    assert all(np.array_equal(kernel.weights[key], WEIGHTS[key]) for key in WEIGHTS)
    assert kernel.payload == NATIVE
    assert unpack(PACKED, KEY.public_key()).kernel_id == kernel.kernel_id


def test_same_content_gives_same_bytes_whatever_the_order():
    backwards = dict(reversed(WEIGHTS.items()))
    assert pack(manifest(), backwards, KEY, payload=NATIVE) == PACKED
    assert pack(manifest(), {**WEIGHTS, "lin.bias": np.ones(4, np.float32)}, KEY, payload=NATIVE) != PACKED


def test_another_signer_is_refused():
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(TamperedError, match="signature"):
        unpack(pack(manifest(), WEIGHTS, other), PUBLIC)


@settings(max_examples=50)
@given(position=st.integers(0, len(PACKED) - 1), flip=st.integers(1, 255))
def test_no_changed_byte_gets_through(position: int, flip: int):
    data = bytearray(PACKED)
    data[position] ^= flip
    with pytest.raises((SafetyError, KernelRejectedError)):
        unpack(bytes(data), PUBLIC)


@settings(max_examples=30)
@given(cut=st.integers(0, len(PACKED) - 1))
def test_no_shortened_file_gets_through(cut: int):
    with pytest.raises((SafetyError, KernelRejectedError)):
        unpack(PACKED[:cut], PUBLIC)


@pytest.mark.parametrize("extra", [b"\0", b"PK"])
def test_no_bytes_can_be_hung_on(extra: bytes):
    for data in (PACKED + extra, extra + PACKED):
        with pytest.raises(TamperedError):
            unpack(data, PUBLIC)


def test_a_comment_cannot_hide():
    buffer = io.BytesIO(PACKED)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"hello"
    with pytest.raises(TamperedError, match="does not stand at its end"):
        unpack(buffer.getvalue(), PUBLIC)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "payload/../../x", "payload/cpu/../x", "notes.txt", "payload/x"]
)
def test_unknown_and_escaping_names_are_refused(name: str):
    with pytest.raises(KernelRejectedError, match="no member"):
        unpack(rezip([*members().items(), (name, b"x")]), PUBLIC)
    with pytest.raises(KernelRejectedError, match="no member"):
        pack(manifest(), WEIGHTS, KEY, payload={name: b"x"})


def test_a_second_copy_is_refused():
    with pytest.warns(UserWarning, match="Duplicate"):
        data = rezip([*members().items(), (container.WEIGHTS, b"x")])
    with pytest.raises(KernelRejectedError, match="twice"):
        unpack(data, PUBLIC)


def test_an_unlisted_payload_is_refused():
    with pytest.raises(TamperedError, match=r"payload/cpu/b\.so"):
        unpack(rezip([*members().items(), ("payload/cpu/b.so", b"x")]), PUBLIC)


@pytest.mark.parametrize("name", [container.MANIFEST, container.WEIGHTS, container.SIGNATURE])
def test_a_missing_member_is_refused(name: str):
    with pytest.raises(KernelRejectedError, match="has no"):
        unpack(rezip([(n, b) for n, b in members().items() if n != name]), PUBLIC)


def test_a_zip_bomb_is_refused_before_it_is_inflated():
    parts = [(n, b) for n, b in members().items() if n != container.WEIGHTS]
    with pytest.raises(KernelRejectedError, match="compressed"):
        unpack(rezip([*parts, (container.WEIGHTS, bytes(1 << 22))], zipfile.ZIP_DEFLATED), PUBLIC)


def test_limits(monkeypatch: pytest.MonkeyPatch):
    many = [(f"payload/cpu/{i}.so", b"") for i in range(container.MAX_MEMBERS)]
    with pytest.raises(KernelRejectedError, match="members"):
        unpack(rezip([*members().items(), *many]), PUBLIC)
    with pytest.raises(KernelRejectedError, match="too large"):
        pack(manifest(), WEIGHTS, KEY, payload=dict(many))
    monkeypatch.setattr(container, "MAX_MANIFEST_BYTES", 10)
    with pytest.raises(KernelRejectedError, match="manifest"):
        unpack(PACKED, PUBLIC)
    monkeypatch.setattr(container, "MAX_CONTAINER_BYTES", len(PACKED) - 1)
    with pytest.raises(KernelRejectedError, match="limit"):
        unpack(PACKED, PUBLIC)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ir_hash": "0" * 64}, "ir_hash"),
        ({"fingerprint": "elsewhere"}, "compile_key"),
        ({"num_parameters": 21}, container.WEIGHTS),
        ({"ir": IR.model_copy(update={"output": "nobody"})}, "ir"),
    ],
)
def test_a_signed_lie_is_refused(changes: dict, field: str):
    with pytest.raises(KernelRejectedError) as caught:
        unpack(pack(manifest(**changes), WEIGHTS, KEY), PUBLIC)
    assert caught.value.field == field


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float):
    with pytest.raises(KernelRejectedError, match="finite"):
        unpack(pack(manifest(), {**WEIGHTS, "lin.bias": np.full(4, bad, np.float32)}, KEY), PUBLIC)


def test_weights_of_other_dtypes_are_not_packed():
    with pytest.raises(KernelRejectedError, match="int64"):
        pack(manifest(), {"lin.weight": np.zeros(3, np.int64)}, KEY)


def test_key_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "keys" / "signing.pem"
    first = keys.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["signing.pem"]
    assert keys.public_hex(keys.load_or_create(path)) == keys.public_hex(first)


def test_a_readable_missing_or_wrong_key_is_refused(tmp_path):
    path = tmp_path / "signing.pem"
    with pytest.raises(ConfigError, match="cannot read"):
        keys.load(path)
    keys.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.load(path)
    path.write_text("not a key")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="PEM"):
        keys.load(path)
    for text in ("xyz", "ab"):
        with pytest.raises(ConfigError, match="64 hexadecimal"):
            keys.public_key(text)


def test_a_key_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        keys.load_or_create(tmp_path / "file" / "signing.pem")
