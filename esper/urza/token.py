"""The bearer token of Urza's HTTP gateway: a file that only its owner can read."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from pathlib import Path

from esper.leyline import ConfigError

MIN_LENGTH = 16
_FIELD = "urza.http.token_file"


def load_or_create(path: str | Path) -> str:
    """Reads the token; where there is no file, makes one with mode 0600.

    Raises:
        ConfigError: if it cannot be read or written, others can read it, or it is too short to be a secret.
    """
    target = Path(path).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return _load(target)
        token = secrets.token_hex(32)
        with os.fdopen(descriptor, "w") as file:
            file.write(token + "\n")
    except OSError as error:
        raise ConfigError(f"cannot use {target}: {error.strerror}", field=_FIELD) from error
    return token


def digest(token: str) -> str:
    """What the gateway holds instead of the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def _load(target: Path) -> str:
    mode = stat.S_IMODE(target.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{target} has mode {mode:04o}", field=_FIELD, remedy="chmod 600 it")
    token = target.read_text().strip()
    if len(token) < MIN_LENGTH:
        raise ConfigError(
            f"{target} holds fewer than {MIN_LENGTH} characters", field=_FIELD, remedy="remove it: Esper makes one"
        )
    return token
