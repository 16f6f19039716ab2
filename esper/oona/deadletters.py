"""What becomes of a message that a group cannot take: a letter that tells of it, as a message of its own.

The broker does not know what bytes mean; here they are wrapped, not understood.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence

from pydantic import ValidationError

from esper.leyline.bus import DeadLetter
from esper.leyline.contract import new_id
from esper.leyline.messages import OonaMessage, Topic
from esper.oona.wire import Record

SENDER = "oona"

logger = logging.getLogger(__name__)


def letters_of(held: Sequence[tuple[int, int, Record]], *, group: str, shard: int, reason: str) -> list[Record]:
    """The letters for what `Broker.held` returned. A letter that cannot be taken itself gets none."""
    letters: list[Record] = []
    for offset, attempts, record in held:
        where = {"group": group, "topic": record.topic, "shard": shard, "offset": offset, "attempts": attempts}
        logger.warning("oona.message.dead", extra={**where, "reason": reason})
        if record.topic != Topic.DEAD_LETTERS:
            letters.append(_letter(record, where, reason))
    return letters


def spent_reason(limit: int | None) -> str:
    """Why a record is given up that was delivered too often."""
    return f"not acknowledged after {limit} deliveries"


def _letter(record: Record, where: dict[str, object], reason: str) -> Record:
    try:
        data, encoding = record.data.decode(), "utf-8"
    except UnicodeDecodeError:
        data, encoding = base64.b64encode(record.data).decode(), "base64"
    body = DeadLetter.model_validate({**where, "key": record.key, "reason": reason, "data": data, "encoding": encoding})
    message = OonaMessage.of(
        Topic.DEAD_LETTERS,
        body,
        sender_id=SENDER,
        key=record.key[:256] or "-",
        trace_id=_trace_of(record.data),
    )
    return Record(Topic.DEAD_LETTERS.value, record.key, message.model_dump_json().encode())


def _trace_of(data: bytes) -> str:
    """The message's own trace, where it has one."""
    try:
        return OonaMessage.model_validate_json(data).trace_id
    except ValidationError:
        return new_id()
