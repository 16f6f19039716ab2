"""Keys of the signer: one Ed25519 pair a platform, made on first start. The public key travels as hexadecimal."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from esper.leyline.errors import ConfigError


def load_or_create(path: str | Path) -> Ed25519PrivateKey:
    """Reads the private key at `path`; where there is none, makes one that only its owner can read.

    Of processes that start at once, one makes the key and all return it.

    Raises:
        ConfigError: if the key cannot be written or read, or others can read it.
    """
    target = Path(path).expanduser()
    if not target.exists():
        _create(target)
    return load(target)


def load(path: str | Path) -> Ed25519PrivateKey:
    """Reads a private key in PEM form.

    Raises:
        ConfigError: if it is missing, is no Ed25519 key, or can be read by others.
    """
    target = Path(path).expanduser()
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
        pem = target.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the signing key: {error.strerror}", field=str(target)) from error
    if mode & 0o077:
        raise ConfigError(f"the signing key has mode {mode:04o}", field=str(target), remedy="chmod 600 it")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("is no unencrypted private key in PEM form", field=str(target)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError("is no Ed25519 key", field=str(target), remedy="remove it and let Esper make one")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half as 64 hexadecimal digits, as runs pin it."""
    return key.public_key().public_bytes_raw().hex()


def public_key(text: str) -> Ed25519PublicKey:
    """Inverse of `public_hex`.

    Raises:
        ConfigError: if `text` is not 64 hexadecimal digits.
    """
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError as error:
        raise ConfigError("a public key is 64 hexadecimal digits", field="public_key") from error


def _create(target: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, target)  # atomic, and refuses to overwrite a key made meanwhile
        except FileExistsError:
            return
        finally:
            draft.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write the signing key {target}: {error.strerror}",
            field="tezzeret.key_file",
            remedy="name a file in a folder you may write to",
        ) from error
