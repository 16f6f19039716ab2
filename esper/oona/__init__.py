"""Oona, the message bus: at least once, order within (topic, key), groups with leases, a log that survives a crash.

`broker` decides, over `spans` of offsets and `packed` records; `log` and `journal` remember, `publisher` and `consumer`
are the ends, `memory` is the bus of one process. `actors/oona.py` puts a journal into a Ray actor. Imports no torch.
"""

from esper.oona.broker import Admission, Broker
from esper.oona.client import BusClient
from esper.oona.duplicates import Duplicates
from esper.oona.journal import Journal
from esper.oona.log import SegmentLog
from esper.oona.memory import MemoryBus
from esper.oona.requests import Requester, Responder
from esper.oona.standing import StandingBus
from esper.oona.start import Start
from esper.oona.stats import merged
from esper.oona.transport import Received, Shelf, Transport
from esper.oona.wire import (
    Batch,
    Leased,
    Record,
    decode_batch,
    decode_leased,
    encode_batch,
    encode_leased,
    shard_of,
)

__all__ = [
    "Admission",
    "Batch",
    "Broker",
    "BusClient",
    "Duplicates",
    "Journal",
    "Leased",
    "MemoryBus",
    "Received",
    "Record",
    "Requester",
    "Responder",
    "SegmentLog",
    "Shelf",
    "StandingBus",
    "Start",
    "Transport",
    "decode_batch",
    "decode_leased",
    "encode_batch",
    "encode_leased",
    "merged",
    "shard_of",
]
