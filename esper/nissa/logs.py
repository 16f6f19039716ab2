"""Structured logs over the standard library: one event a line, dotted and in the past tense (`seed.grafted`).

Fields come from `extra={...}` and from `bind`, which ties run, actor, seed or step to everything logged inside it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

_BOUND: ContextVar[dict[str, Any] | None] = ContextVar("esper_log_fields", default=None)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
ROOTS = ("esper", "actors", "jobs")


@contextlib.contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Adds fields to every event that is logged inside, in this thread or task."""
    token = _BOUND.set({**(_BOUND.get() or {}), **fields})
    try:
        yield
    finally:
        _BOUND.reset(token)


class _Fields(logging.Filter):
    """Attaches what is bound, in the thread that logs."""

    def __init__(self, fixed: dict[str, Any]) -> None:
        super().__init__()
        self._fixed = fixed

    def filter(self, record: logging.LogRecord) -> bool:
        record.esper_fields = {**self._fixed, **(_BOUND.get() or {})}
        return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    own = {k: v for k, v in vars(record).items() if k not in _STANDARD and k != "esper_fields"}
    return {**getattr(record, "esper_fields", {}), **own}


class JsonLines(logging.Formatter):
    """One JSON object a line: `at` (UTC, ISO 8601), `level`, `logger`, `event`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "at": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class KeyValue(logging.Formatter):
    """`12:31:04 warning seed.culled site=blocks.1 reason="no gain"`; values with blanks are quoted."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_timestamp(record)[11:19], record.levelname.lower(), record.getMessage()]
        parts += [f"{key}={_quoted(value)}" for key, value in _fields(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n\t') else text


_FORMATS: dict[str, type[logging.Formatter]] = {"json": JsonLines, "text": KeyValue}


def configure(
    target: Path | TextIO | None = None,
    *,
    form: Literal["json", "text"] | None = None,
    level: int = logging.INFO,
    **fields: Any,
) -> logging.Logger:
    """Sets this process's logging up; a second call replaces the first.

    Args:
        target: a file (appended to), a stream, or None for standard error.
        form: `json` or `text`; by default JSON in files and text on streams.
        level: the least level that is written.
        **fields: bound to every event of this process, such as `actor="urza"`.

    Returns:
        The library's logger; those of actors and jobs write to the same place.

    Raises:
        OSError: if the file cannot be opened.
    """
    handler: logging.Handler
    if isinstance(target, Path):
        handler = logging.FileHandler(target, encoding="utf-8")
    else:
        handler = logging.StreamHandler(target or sys.stderr)
    handler.setFormatter(_FORMATS[form or ("json" if isinstance(target, Path) else "text")]())
    handler.addFilter(_Fields(fields))
    for root in ROOTS:
        logger = logging.getLogger(root)
        for old in list(logger.handlers):
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    return logging.getLogger(ROOTS[0])
