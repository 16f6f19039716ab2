"""The base of every message and record: frozen, closed to unknown keys, versioned as a whole by `API_VERSION`."""

from __future__ import annotations

import time
import uuid
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

API_VERSION = 1
"""Version of all contracts together. It grows when a reader of the old form would misread the new one."""


class Contract(BaseModel):
    """Frozen, rejects unknown keys, rejects NaN and infinity in its JSON form (they become `null` and fail to load)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="null")


Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A float that is neither NaN nor infinite."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
"""A float in [0, 1]."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 digest in lower-case hexadecimal."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,127}$")]
"""A name that is safe in a path, a label and an actor name."""


def new_id() -> str:
    """Returns a fresh random identifier, 32 hexadecimal digits."""
    return uuid.uuid4().hex


def now() -> float:
    """Returns the wall-clock time in seconds since the epoch."""
    return time.time()
