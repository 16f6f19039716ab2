"""What the process environment says. Below `jobs/` nothing reads it: values are passed on as arguments."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def data_root() -> str | None:
    """The folder of data sets: `ESPER_DATA`, else `shared/data` beside the checkout if it is there."""
    if root := os.environ.get("ESPER_DATA"):
        return root
    beside = REPOSITORY.parent / "shared" / "data"
    return str(beside) if beside.is_dir() else None
