"""A broker whose state survives: every change is a frame of the log before it is answered.

On start the log is read into a fresh broker. Leases begin anew with the members that held them, so that consumers
that outlived the broker go on without duplicates; a dead member's leases run out.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper.leyline.bus import BusStats
from esper.leyline.errors import EsperError, TamperedError, UnavailableError
from esper.leyline.summary import BusCounts
from esper.oona.broker import Admission, Broker
from esper.oona.deadletters import letters_of, spent_reason
from esper.oona.drops import DropTold
from esper.oona.frames import Frame
from esper.oona.groups import LISTENER
from esper.oona.kinds import OF_OFFSETS, PLACE, TIME, Kind, batch_of, pairs_of, spans_in
from esper.oona.log import SegmentLog
from esper.oona.spans import num_in, spans_of
from esper.oona.start import Start
from esper.oona.transport import Shelf
from esper.oona.unplaced import first_offsets
from esper.oona.wire import Batch, Leased, Record

FORGET_AFTER_S = 86_400.0
"""A group that nobody used for so long loses its position, or the log would grow for it for ever."""
ABANDON_AFTER_S = 600.0
"""So long may a group that nobody uses keep publishers waiting, if it fills half the backlog, or keep old records from
going, if it makes them twice as much or as old as they may be; it is forgotten then."""

GRACE_S = 30.0
"""So long has a group to say that it is used, once the log is open: what is waited for is not in the log."""

LOOK_S = 0.5
"""From one look for such groups to the next: there may be thousands."""

logger = logging.getLogger(__name__)


class Journal:
    """The broker of one shard over its log. Not safe for threads; `sync` alone may run beside the rest.

    Args:
        log: opened, not yet read.
        broker: fresh; the log is read into it.
        now: the present, on the caller's monotonic clock.
        shard: its number, for what is told of records.
        lasting: groups that are never forgotten, such as the archive's: what they have not acknowledged is kept.
        at: the present, seconds since the epoch; 0 if it is not known.

    Raises:
        StorageError: if the log is damaged.
        TamperedError: if a frame cannot be understood.
    """

    def __init__(
        self,
        log: SegmentLog,
        broker: Broker,
        *,
        now: float,
        shard: int = 0,
        lasting: Collection[str] = (),
        at: float = 0.0,
    ) -> None:
        self._log = log
        self._shard = shard
        self._told = DropTold(shard)
        self._told_bytes = 0  # that are kept for a group beyond what may be
        self._broker = broker
        self._lasting = frozenset(lasting)
        self._look_at = now + GRACE_S
        self._used_at: dict[str, float] = {}  # while the log is read: when it last tells of a group, by the log's times
        self._known_since = 0.0  # the first of these times
        self._roll_at = math.inf
        self._is_gapped = False  # a part of the log was lost
        self._knows_offset = True  # of the next record; not behind such a part, until something tells it
        self._places: dict[int, int] | None = None  # see `first_offsets`
        self._number = 0  # of the frame that is read
        self._lost: set[str] = set()  # groups of which it is not known any more what they read
        self._replay(now)
        self._take_over_idleness(now, at)
        if log.is_read_only:
            return
        try:
            self._roll(0.0)
        except UnavailableError as error:  # what is there can be read; with the first change it is tried again
            logger.warning("oona.log.waits", extra={"shard": shard, "reason": str(error)})

    @classmethod
    def open(
        cls,
        directory: Path,
        broker: Broker,
        *,
        now: float,
        wait_s: float = 0.0,
        shard: int = 0,
        lasting: Collection[str] = (),
        is_synced: bool = True,
        at: float = 0.0,
    ) -> Journal:
        """Opens the log in `directory`; see `SegmentLog` for its arguments and what it raises."""
        log = SegmentLog(directory, wait_s=wait_s, is_synced=is_synced)
        try:
            return cls(log, broker, now=now, shard=shard, lasting=lasting, at=at)
        except BaseException:
            log.close()
            raise

    @classmethod
    @contextmanager
    def standing(cls, directory: Path, broker: Broker, *, now: float, at: float, shard: int) -> Iterator[Journal]:
        """The journal of a shard that does not run, to be looked at alone; see `open` for what it raises."""
        log = SegmentLog(directory, is_read_only=True)
        try:
            yield cls(log, broker, now=now, shard=shard, at=at)
        finally:
            log.close()

    @property
    def next_expiry(self) -> float:
        """No lease runs out before this time."""
        return self._broker.next_expiry

    def append(self, batch: Batch, body: bytes, *, at: float = 0.0) -> Admission:
        """Takes a batch if the broker admits it; after ACCEPT and DUPLICATE it is safe with the log.

        Args:
            batch: what `body` encodes; decoded once by the caller, who may have to ask again.
            body: what is written.
            at: the time, seconds since the epoch; 0 if it is not known.
        """
        if self._log.is_full or at >= self._roll_at:  # here, where the log and the broker tell the same
            self._roll(at)
        admission = self._broker.admit(batch)
        if admission is Admission.ACCEPT:
            for name, spans in self._broker.surplus(batch).items():
                self._write_json(Kind.DROP_SPANS, (name, pairs_of(spans)))
                self._broker.drop(name, spans)
                self._told.tell(name, num_in(spans))
            self._write(Kind.PACKED_BATCH, PLACE.pack(at, self._broker.next_offset) + body)
            self._broker.append(batch, at)
        return admission

    def join(self, name: str, topics: Sequence[str], *, key: str | None, start: Start, now: float) -> None:
        """Makes a group known; see `Broker.join`. One whose position was lost gets all that is kept."""
        lost = name in self._lost
        offset = self._broker.first_offset if lost else start.offset(self._broker, self._shard)
        if self._broker.join(name, topics, key=key, start=offset, now=now):
            try:
                self._write_json(Kind.JOIN, (name, list(topics), key, offset))
            except EsperError:
                self._broker.forget(name)  # or it would be known here and not to the log
                raise
            self._lost.discard(name)

    def poll(self, name: str, member: str, number: int, max_records: int, now: float) -> list[Leased]:
        """See `Broker.poll`. Call `bury_exhausted` before."""
        chosen, is_new = self._broker.next_for(name, member, number, max_records, now)
        if chosen and is_new:
            self._write_json(Kind.LEASE_SPANS, (name, member, number, pairs_of(chosen)))
            self._broker.lease(name, member, number, chosen, now + self._broker.lease_s)
        return self._broker.leased(name, chosen)

    def ack(self, name: str, offsets: Iterable[int | range], now: float) -> int:
        """See `Broker.ack`; returns how many were new."""
        held = self._broker.outstanding(name, offsets)
        if held:
            self._write_json(Kind.ACK_SPANS, (name, pairs_of(held)))
        self._broker.ack(name, held, now)
        return num_in(held)

    def bury_exhausted(self, name: str, *, at: float = 0.0) -> int:
        """Gives up what came back from its last delivery; returns how many. See `bury`."""
        spent = self._broker.exhausted(name)
        return self.bury(name, spent, spent_reason(self._broker.max_deliveries), at=at) if spent else 0

    def bury(self, name: str, offsets: Iterable[int | range], reason: str, *, at: float = 0.0) -> int:
        """Gives records up for a group, with a letter for each; returns how many it had.

        Args:
            name: of the group.
            offsets: of what was delivered to it; others are passed over.
            reason: why, in words.
            at: the time, seconds since the epoch.

        Raises:
            NotFoundError: if there is no such group.
        """
        held = self._broker.held(name, offsets)
        if held:
            letters = letters_of(held, group=name, shard=self._shard, reason=reason)
            dead = [offset for offset, _, _ in held]
            written = [(letter.topic, letter.key, letter.data.decode()) for letter in letters]
            self._write_json(Kind.BURY, (name, dead, written, at, self._broker.next_offset))
            self._broker.bury(name, dead, letters, at)
        return len(held)

    def requeue(self, name: str, offsets: Iterable[int | range]) -> int:
        """Gives a group again what it gave up; returns how many are kept and were dead. See `Broker.requeue`."""
        dead = self._broker.dead(name, offsets)
        if dead:
            self._write_json(Kind.REQUEUE_SPANS, (name, pairs_of(dead)))
            self._broker.requeue(name, dead)
        return num_in(dead)

    def read(self, start: Start, topics: Sequence[str], key: str | None, max_records: int) -> Shelf:
        """See `Kept.read`."""
        first = start.offset(self._broker, self._shard)
        records, position = self._broker.kept.read(first, topics, key, max_records)
        return Shelf(records, position, self._broker.next_offset)

    def stats(self, now: float) -> BusStats:
        """See `Broker.stats`."""
        return self._broker.stats(now)

    def leave(self, name: str, member: str) -> None:
        """See `Broker.leave`."""
        self._broker.leave(name, member)
        self._write_json(Kind.LEAVE, (name, member))

    def forget(self, name: str) -> None:
        """Ends a group; one that is not there is no error."""
        if name in self._broker.groups:
            self._broker.forget(name)
            self._write_json(Kind.FORGET, (name,))

    def has_left(self, member: str) -> bool:
        """See `Broker.has_left`."""
        return self._broker.has_left(member)

    def expire(self, now: float, at: float = 0.0) -> int:
        """Takes back leases that ran out, lets old records go, and forgets groups that nobody uses any more.

        Args:
            now: on the clock of the other calls.
            at: seconds since the epoch; 0 if it is not known.
        """
        if self._broker.kept.is_due(at):
            self._broker.trim(at)
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._forget_idle(now)
            self._look_at_holders(now, at)
        return self._broker.expire(now)

    def tidy(self, now: float, at: float) -> int:
        """What time alone brings about, where nobody publishes or asks; see `expire`. What is too old leaves the disk.

        Raises:
            UnavailableError: if the disk refuses.
        """
        num_expired = self.expire(now, at)
        if at >= self._roll_at:
            self._roll(at)
        return num_expired

    def takers(self, batch: Batch) -> set[str]:
        """See `Broker.takers`."""
        return self._broker.takers(batch)

    def counts(self, key: str) -> BusCounts:
        """See `Broker.counts`."""
        return self._broker.counts(key)

    def sync(self) -> None:
        """Makes all that was answered survive the host's death."""
        self._log.sync()

    def close(self) -> None:
        """Syncs and lets go of the log."""
        self._log.close()

    # ---- within

    def _forget_idle(self, now: float) -> None:
        abandoned = self._broker.idle_groups(now, ABANDON_AFTER_S, pending=self._broker.backlog // 2)
        listeners = [name for name in self._broker.idle_groups(now, ABANDON_AFTER_S) if name.startswith(LISTENER)]
        self._forget(listeners, "its listener is gone", ABANDON_AFTER_S)
        self._forget(abandoned, "nobody reads it, and it holds half of the backlog", ABANDON_AFTER_S)
        self._forget(self._broker.idle_groups(now, FORGET_AFTER_S), "nobody reads it", FORGET_AFTER_S)

    def _look_at_holders(self, now: float, at: float) -> None:
        """What a group needs stays, however much or old it is. That is told; a group that nobody uses ends."""
        holders = self._broker.holders(at)
        if not holders:
            self._told_bytes = 0
            return
        idle = set(self._broker.idle_groups(now, ABANDON_AFTER_S)) - self._lasting
        if gone := [name for name in holders if name in idle]:
            self._forget(gone, "nobody reads it, and old records stay for it alone", ABANDON_AFTER_S)
            self._broker.trim(at)
        elif (num_bytes := self._broker.kept.num_bytes) >= 2 * self._told_bytes:
            self._told_bytes = num_bytes
            told = {"groups": holders[:3], "num_bytes": num_bytes, "shard": self._shard}
            logger.warning("oona.records.held", extra=told)

    def _forget(self, names: Sequence[str], reason: str, idle_s: float) -> None:
        for name in names:
            if name in self._lasting:
                continue
            logger.warning("oona.group.forgotten", extra={"group": name, "reason": reason, "idle_s": idle_s})
            self._broker.forget(name)
            self._write_json(Kind.FORGET, (name,))

    def _write_json(self, kind: Kind, values: object) -> None:
        self._write(kind, json.dumps(values, separators=(",", ":")).encode())

    def _write(self, kind: Kind, body: bytes) -> None:
        if not self._log.is_open:  # the disk refused when this was opened
            self._roll(0.0)
        self._log.write(kind, body)

    def _roll(self, at: float) -> None:
        retain_s = self._broker.kept.retain_s
        snapshot = json.dumps(self._broker.snapshot(), separators=(",", ":")).encode()
        self._log.roll(self._broker.next_offset, Kind.SNAPSHOT, snapshot)
        self._roll_at = math.inf if retain_s is None else max(at, self._broker.kept.newest_at) + retain_s / 8
        self._log.drop_below(self._broker.first_offset)

    def _replay(self, now: float) -> None:
        for num_frames, frame in enumerate(self._log.replay()):
            self._number = num_frames
            try:
                self._apply(frame, now, is_first=num_frames == 0)
            except (ValueError, TypeError, KeyError, struct.error) as error:
                where = f"frame {num_frames} of the log in {self._log.directory}"
                raise TamperedError(f"{where} cannot be understood: {error}") from error

    def _apply(self, frame: Frame, now: float, *, is_first: bool) -> None:
        kind = Kind(frame.kind)
        if kind in {Kind.PACKED_BATCH, Kind.PLACED_BATCH}:
            at, offset = PLACE.unpack_from(frame.body)
            self._place(offset)
            self._broker.append(batch_of(kind, frame.body), at)
            self._known_since = self._known_since or at
        elif kind in {Kind.TIMED_BATCH, Kind.BATCH}:  # logs of the first two forms
            self._find_place()
            self._broker.append(
                batch_of(kind, frame.body), 0.0 if kind is Kind.BATCH else TIME.unpack_from(frame.body)[0]
            )
        elif kind is Kind.GAP:
            self._is_gapped, self._knows_offset = True, False
        elif kind is Kind.SNAPSHOT:
            self._take_over(json.loads(frame.body), now, is_first=is_first)
        else:
            self._repeat(kind, json.loads(frame.body), now)

    def _take_over_idleness(self, now: float, at: float) -> None:
        """Groups are as idle as the log says, or those of one short run after another would never be forgotten. A time
        in which the bus was down is no idleness, but of a listener, whose process does not outlive it for long.
        """
        newest = self._broker.kept.newest_at
        down_s = max(0.0, at - newest) if newest else 0.0
        for name in self._broker.groups:
            idle_s = max(0.0, newest - (self._used_at.get(name) or self._known_since or newest))
            self._broker.seen(name, now - idle_s - (down_s if name.startswith(LISTENER) else 0.0))
        self._used_at.clear()

    def _find_place(self) -> None:
        """Of the first record behind a part that was lost, in a log whose frames do not tell it."""
        if self._knows_offset:
            return
        if self._places is None:
            self._places = first_offsets(self._log.replay())
        if self._number not in self._places:
            raise ValueError("its offset is not known, as something before it and something behind it was lost")
        self._place(self._places[self._number])

    def _place(self, offset: int) -> None:
        """The next record has this offset; only what was lost may lie before it."""
        if self._is_gapped:
            self._broker.kept.skip_to(offset)
            self._knows_offset = True
        if offset != self._broker.next_offset:
            raise ValueError(f"it begins at {offset}, not at {self._broker.next_offset}")

    def _take_over(self, snapshot: Any, now: float, *, is_first: bool) -> None:
        if is_first:
            self._broker.restore(snapshot, now=now)
            return
        if self._is_gapped:
            self._broker.reconcile(snapshot, now=now)
            self._knows_offset = True
            self._lost.clear()
        self._broker.recount(snapshot)

    def _repeat(self, kind: Kind, values: Any, now: float) -> None:
        broker = self._broker
        if kind is Kind.JOIN:
            name, topics, key, start = values
            broker.join(name, topics, key=key, start=start, now=now)
            self._lost.discard(name)
            self._used_at[name] = broker.kept.newest_at
            return
        name, *rest = values
        self._used_at[name] = broker.kept.newest_at
        if kind is Kind.LEAVE:
            broker.leave(name, *rest)
        elif kind is Kind.FORGET:
            broker.forget(name)
            self._lost.discard(name)
        elif kind is Kind.BURY:
            self._repeat_bury(name, *rest)
        elif kind is Kind.REQUEUE_SPANS:
            if name in broker.groups:
                broker.requeue(name, broker.dead(name, spans_in(kind, rest)))
        else:
            self._repeat_for(OF_OFFSETS.get(kind, kind), name, *rest[:-1], spans=spans_in(kind, rest), now=now)

    def _repeat_for(self, kind: Kind, name: str, *rest: Any, spans: list[range], now: float) -> None:
        """What a group was given, or gave back; of a group that is lost, it is lost too."""
        known = self._known(name, spans)
        if name in self._lost:
            return
        if kind is Kind.LEASE:
            member, number = rest
            self._broker.lease(name, member, number, known, now + self._broker.lease_s)
        elif kind is Kind.ACK:
            self._broker.ack(name, known, now)
        elif kind is Kind.DROP:
            self._broker.drop(name, known)
        else:
            raise ValueError(f"a frame of kind {kind.name}")

    def _repeat_bury(self, name: str, offsets: list[int], letters: Any, at: float, place: int | None = None) -> None:
        """`place` is the offset of the first letter, which logs of the second form do not tell."""
        known = self._known(name, spans_of(offsets))
        records = [Record(topic, key, data.encode()) for topic, key, data in letters]
        if records:
            self._find_place() if place is None else self._place(place)
        if name in self._lost:
            self._broker.append_letters(records, at)
        else:
            self._broker.bury(name, known, records, at)

    def _known(self, name: str, spans: list[range]) -> list[range]:
        """Those that the group has before it. Others there are only of what was lost, and no new record may be taken
        for one of them. A group of which was lost that it joined is noted, as what it reads is not known any more.
        """
        if not self._is_gapped:
            return spans
        self._broker.kept.skip_to(max((span.stop for span in spans), default=0))
        if name not in self._broker.groups:
            self._lost.add(name)
            return []
        return self._broker.before(name, spans)
