"""The signed file a kernel travels in: a zip of stored members, in one fixed form.

    manifest.json                what the kernel is, and size and SHA-256 of every member below
    weights.safetensors          initial parameters, float32 or float64
    payload/<target>/<file>      native code, optional
    signature.ed25519            over the bytes of manifest.json

The same content gives the same bytes, so a reader rebuilds the file from its members and refuses any other form of
it: no compression, comments, extra fields, gaps or second copies can hide anything. Nothing is interpreted before the
signature over it holds. This module holds no torch and does not know what a node does.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import safetensors
import safetensors.numpy
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, ValidationError

from esper.leyline.blueprints import BlueprintIR
from esper.leyline.canonical import canonical_hash
from esper.leyline.contract import Contract, Name, Sha256
from esper.leyline.errors import BlueprintError, KernelRejectedError, TamperedError, excerpt
from esper.leyline.kernels import Pipeline, SiteSignature, ValidationReport, compile_key
from esper.leyline.keys import public_key as parse_public_key
from esper.leyline.native import NativeFacts, Timing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
SIGNATURE = "signature.ed25519"
MAX_CONTAINER_BYTES = 2 << 30
MAX_MANIFEST_BYTES = 4 << 20
MAX_MEMBERS = 64
MAX_DIRECTORY_BYTES = MAX_MEMBERS * (46 + 256)

_PAYLOAD = re.compile(r"^payload/[a-z0-9][a-z0-9_\-]{0,63}/[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_DTYPES = ("float32", "float64")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sLQL")
_UNREADABLE = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, OverflowError, struct.error)
"""What `zipfile` raises on bytes that are not a zip, or no longer one."""


class Member(Contract):
    """What the manifest promises of one other file."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0, le=MAX_CONTAINER_BYTES)]


class KernelManifest(Contract):
    """All that is signed, apart from the bytes whose hashes are listed.

    Attributes:
        members: filled in by `pack`.
        native: what the payload is; None for a kernel that runs from its IR.
        dropped: timing of native code that was tried and not kept.
        The others are as in `CompiledKernelArtifact`.
    """

    container_version: Literal[1] = 1
    ir: BlueprintIR
    ir_hash: Sha256
    compile_key: Sha256
    signature: SiteSignature
    pipeline: Pipeline
    optimization_level: Annotated[int, Field(ge=0, le=3)] = 0
    fingerprint: str
    blueprint_id: Name
    blueprint_name: Name
    num_parameters: Annotated[int, Field(ge=0)]
    flops_per_sample: Annotated[int, Field(ge=0)]
    memory_bytes: Annotated[int, Field(ge=0)]
    zero_at_birth: bool
    replaces: bool
    needs_neighbour: bool
    tags: tuple[Name, ...] = ()
    report: ValidationReport
    native: NativeFacts | None = None
    dropped: Timing | None = None
    members: dict[str, Member] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A verified container's content.

    Attributes:
        kernel_id: SHA-256 of the container.
        weights: initial parameters by state-dict key.
        payload: native code by member name, untouched.
    """

    kernel_id: str
    manifest: KernelManifest
    weights: Mapping[str, np.ndarray]
    payload: Mapping[str, bytes] = field(default_factory=dict)


def kernel_id_of(data: bytes | memoryview) -> str:
    """The id of a container: SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()


def pack(
    manifest: KernelManifest,
    weights: Mapping[str, np.ndarray],
    private_key: Ed25519PrivateKey,
    *,
    payload: Mapping[str, bytes] | None = None,
) -> bytes:
    """Builds and signs a container; the same arguments give the same bytes.

    Args:
        manifest: its `members` are replaced.
        weights: float32 or float64 arrays by state-dict key.
        private_key: the signer's.
        payload: native code by member name, `payload/<target>/<file>`.

    Raises:
        KernelRejectedError: for a name, dtype or size that a reader would refuse.
    """
    for key, array in weights.items():
        if array.dtype.name not in _DTYPES:
            raise KernelRejectedError(
                f"weights are {array.dtype.name}", field=key, remedy=f"use {' or '.join(_DTYPES)}"
            )
    tensors = {key: np.ascontiguousarray(array) for key, array in weights.items()}
    members = {WEIGHTS: safetensors.numpy.save(tensors), **(payload or {})}
    for name in members:
        _check_name(name)
    listed = {name: Member(sha256=hashlib.sha256(body).hexdigest(), size=len(body)) for name, body in members.items()}
    signed = manifest.model_copy(update={"members": dict(sorted(listed.items()))}).model_dump_json().encode()
    data = _zip({MANIFEST: signed, **members, SIGNATURE: private_key.sign(signed)})
    if len(data) > MAX_CONTAINER_BYTES or len(signed) > MAX_MANIFEST_BYTES or len(members) + 2 > MAX_MEMBERS:
        raise KernelRejectedError(f"a container of {len(data)} bytes and {len(members) + 2} members is too large")
    return data


def unpack(data: bytes | memoryview, public_key: Ed25519PublicKey | str) -> Kernel:
    """Verifies a container and reads it.

    Args:
        data: the container.
        public_key: the signer's, as a key or as hexadecimal.

    Raises:
        TamperedError: if the signature, a hash, a size or the form of the file is not what was signed.
        KernelRejectedError: if it holds what no container may hold, is too large, or contradicts itself.
    """
    key = parse_public_key(public_key) if isinstance(public_key, str) else public_key
    if len(data) > MAX_CONTAINER_BYTES:
        raise KernelRejectedError(f"a container of {len(data)} bytes is above the limit of {MAX_CONTAINER_BYTES}")
    members = _read_members(data)
    signed = members.pop(MANIFEST)
    signature = members.pop(SIGNATURE)
    try:
        key.verify(signature, signed)
    except InvalidSignature as error:
        raise TamperedError("the signature does not match the pinned public key", field=SIGNATURE) from error
    try:
        manifest = KernelManifest.model_validate_json(signed)
    except ValidationError as error:
        raise KernelRejectedError(
            f"the manifest does not read: {error.errors()[0]['msg'][:100]}", field=MANIFEST
        ) from error
    _check_members(manifest, members)
    if _zip({MANIFEST: signed, **members, SIGNATURE: signature}) != data:
        raise TamperedError("the file holds more than its members")
    _check_identity(manifest)
    weights = _read_weights(members.pop(WEIGHTS), manifest)
    return Kernel(kernel_id_of(data), manifest, weights, members)


def _zip(members: Mapping[str, bytes]) -> bytes:
    """The one form of a container: manifest first, signature last, the rest by name, stored, with a fixed time."""
    place = {MANIFEST: 0, SIGNATURE: 2}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members, key=lambda name: (place.get(name, 1), name)):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o600 << 16
            archive.writestr(info, members[name])
    return buffer.getvalue()


def _check_name(name: str) -> None:
    if name not in (MANIFEST, WEIGHTS, SIGNATURE) and not _PAYLOAD.match(name):
        raise KernelRejectedError(f"a container has no member {excerpt(name)}")


def _read_members(data: bytes | memoryview) -> dict[str, bytes]:
    """The raw members; declared sizes are checked before a byte of a member is read."""
    _check_end(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            _check_directory(infos, len(data))
            members = {info.filename: archive.read(info) for info in infos}
    except _UNREADABLE as error:
        raise TamperedError(f"is damaged, or no container: {str(error)[:100]}") from error
    for name in (MANIFEST, WEIGHTS, SIGNATURE):
        if name not in members:
            raise KernelRejectedError(f"the container has no {name}", field=name)
    return members


def _check_end(data: bytes | memoryview) -> None:
    """Bounds the directory before it is read: `zipfile` reads a directory of any size, entry by entry, into memory."""
    if len(data) < _END.size:
        raise TamperedError(f"is no container: {len(data)} bytes")
    signature, _disk, _start, _here, number, size, offset, comment = _END.unpack(data[-_END.size :])
    if signature != b"PK\5\6" or comment or offset + size + _END.size != len(data):
        raise TamperedError("is damaged, or no container: its directory does not stand at its end")
    if number > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
        raise KernelRejectedError(f"a directory of {number} members and {size} bytes is above the limits")
    before = data[-_END.size - _END_64.size : -_END.size]
    if bytes(before[:4]) == b"PK\6\7":
        raise KernelRejectedError("the directory points to another one")  # which `zipfile` would read instead


def _check_directory(infos: list[zipfile.ZipInfo], size: int) -> None:
    if len(infos) > MAX_MEMBERS:
        raise KernelRejectedError(f"a container of {len(infos)} members is above the limit of {MAX_MEMBERS}")
    seen: set[str] = set()
    for info in infos:
        _check_name(info.filename)
        if info.filename in seen:
            raise KernelRejectedError("the member appears twice", field=info.filename)
        seen.add(info.filename)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1 or info.file_size != info.compress_size:
            raise KernelRejectedError("the member is compressed or encrypted", field=info.filename)
        if info.filename == MANIFEST and info.file_size > MAX_MANIFEST_BYTES:
            raise KernelRejectedError(f"the manifest has {info.file_size} bytes", field=MANIFEST)
    if sum(info.file_size for info in infos) > size:
        raise KernelRejectedError("the members declare more bytes than the container has")


def _check_members(manifest: KernelManifest, members: Mapping[str, bytes]) -> None:
    if manifest.members.keys() != members.keys():
        odd = sorted(manifest.members.keys() ^ members.keys())
        raise TamperedError(f"members and manifest differ in {excerpt(', '.join(odd))}")
    for name, body in members.items():
        promised = manifest.members[name]
        if len(body) != promised.size or hashlib.sha256(body).hexdigest() != promised.sha256:
            raise TamperedError("the content does not match the manifest", field=name)


def _check_identity(manifest: KernelManifest) -> None:
    """A signed manifest must still agree with itself: both ids follow from what they name."""
    try:
        ir_hash = canonical_hash(manifest.ir)
    except BlueprintError as error:
        raise KernelRejectedError(f"the IR is malformed: {error}", field="ir") from error
    if ir_hash != manifest.ir_hash:
        raise KernelRejectedError("it is not the hash of the IR", field="ir_hash")
    if compile_key(ir_hash, manifest.signature, manifest.pipeline, manifest.fingerprint) != manifest.compile_key:
        raise KernelRejectedError("it is not the key of this compilation", field="compile_key")


def _read_weights(body: bytes, manifest: KernelManifest) -> dict[str, np.ndarray]:
    try:
        weights = safetensors.numpy.load(body)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise KernelRejectedError(f"the weights do not read: {str(error)[:100]}", field=WEIGHTS) from error
    for key, array in weights.items():
        if array.dtype.name not in _DTYPES or not np.isfinite(array).all():
            raise KernelRejectedError(f"weights are {array.dtype.name} or not finite", field=key)
    total = sum(array.size for array in weights.values())
    if total != manifest.num_parameters:
        raise KernelRejectedError(f"{total} weights for {manifest.num_parameters} parameters", field=WEIGHTS)
    return weights
