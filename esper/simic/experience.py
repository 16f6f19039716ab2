"""Experience: every decision of every run, in one Delta table (`<storage>/experience`) that anyone can read.

A row is what a decision was taken on (Tamiyo's memory, the packet, its configuration) and what it came to. The graph,
the masks and the choice are made of it by whoever reads, at the version of the observation that he wants
(`esper.tamiyo.observation`): rows outlive a change of features. Likewise `reward` is what `reward.Meter` of
`reward_version` paid, and can be paid anew. An epoch without a row had no decision (the governor had gone back), or its
row went with the process that was to write it.

Runs append rows while they train, a few at a time, in a thread: a run that is killed loses those of its last epochs. A
resumed run goes on with the same episode: of two rows of one epoch the later counts. Appends of several writers do not
conflict in Delta; whoever tidies has to yield to them (`esper.delta`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from esper.config import RewardConfig, RunConfig, SimicConfig
from esper.delta import Tidied, tidy
from esper.leyline import AdaptationSignal, EpochRecord, FieldReport, StorageError, SystemStatePacket, new_id, now
from esper.simic.moments import About, Episode, Moment
from esper.simic.reward import REWARD_VERSION, Meter
from esper.storage import Storage

TABLE = "experience"
EXPERIENCE_VERSION = 1
"""Grows when an older reader would misread the rows."""

_SCHEMA = pa.schema(
    [
        pa.field("version", pa.int32()),
        pa.field("run_id", pa.string()),
        pa.field("life", pa.string()),  # of the process that wrote it
        pa.field("written_at", pa.float64()),
        pa.field("epoch", pa.int32()),
        pa.field("about", pa.string()),  # JSON of `About`
        pa.field("state", pa.string()),  # JSON
        pa.field("packet", pa.string()),  # JSON of `SystemStatePacket`
        pa.field("signal", pa.string()),  # JSON of `AdaptationSignal`
        pa.field("policy", pa.string()),
        pa.field("policy_version", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("task", pa.string()),
        pa.field("host", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("reward_version", pa.int32()),
        pa.field("done", pa.bool_()),
        pa.field("last", pa.string()),  # of the row that ends an episode: JSON of its last `EpochRecord`
        pa.field("ended", pa.string()),  # likewise: JSON of its field reports
    ]
)
_TRIES = 5

_log = logging.getLogger(__name__)


@functools.cache
def code_digest() -> str:
    """Returns a hash of the sources that decide and reward."""
    digest = hashlib.sha256()
    for package in ("leyline", "tamiyo", "simic"):
        for path in sorted((Path(__file__).parents[1] / package).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def about_run(config: RunConfig, run_id: str) -> About:
    """Returns what the rows of a run say of it."""
    tamiyo = config.tamiyo
    version = getattr(getattr(tamiyo, tamiyo.policy, None), "version", "")
    return About(
        run_id=run_id,
        policy=tamiyo.policy,
        policy_version=version,
        task=config.task,
        host=config.host.type,
        data=config.data.type,
        seed=config.seed,
        tamiyo=tamiyo.model_dump(mode="json"),
        code=code_digest(),
    )


def log_to(storage: Storage, config: SimicConfig | None = None) -> Callable[[RunConfig, str], ExperienceWriter]:
    """Returns what makes the log of a loop of one's own; see `esper.api.Grown.session`.

    Args:
        storage: where Simic shall find it.
        config: how often to write, and what rewards are; None: as the loop's configuration says.
    """
    return lambda run, run_id: ExperienceWriter(storage, about_run(run, run_id), config or run.simic)


class ExperienceWriter:
    """The log of one run; see `leyline.experience.ExperienceLog`. Not for two threads at a time.

    Args:
        storage: below which the table lies.
        about: the run.
        config: how often to write, and what rewards are.
    """

    def __init__(self, storage: Storage, about: About, config: SimicConfig) -> None:
        self._storage = storage
        self._config = config
        self._about = about
        self._life = new_id()
        self._meter = Meter(config.reward)
        self._open: tuple[Moment, float] | None = None
        self._has_begun = False
        self._rows: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._num_lost = 0

    def decided(self, state: Mapping[str, Any], packet: SystemStatePacket, signal: AdaptationSignal) -> None:
        """See the port. Writes in the background once there is enough, and nothing is being written."""
        reward = self._meter.see(packet)
        self._close_row(reward)
        # of a run that is resumed, the process before has counted what came to pass until then
        is_first = not self._has_begun and packet.epoch.epoch == 0
        self._open = (Moment(dict(state), packet, signal), reward if is_first else 0.0)
        self._has_begun = True
        if len(self._rows) >= self._config.rows_per_write and not self._is_writing():
            rows, self._rows = self._rows, []
            self._thread = threading.Thread(target=self._write, args=(rows,), name="experience")
            self._thread.start()

    def close(self, last: EpochRecord | None, ended: Sequence[FieldReport], *, is_over: bool) -> str | None:
        """See the port."""
        if is_over:
            end = {
                "done": True,
                "last": None if last is None else last.model_dump_json(),
                "ended": json.dumps([report.model_dump(mode="json") for report in ended]),
            }
            self._close_row(self._meter.end(last, ended), end)
        else:
            self._close_row(0.0)
        if self._thread is not None:
            self._thread.join()
        if self._rows:
            rows, self._rows = self._rows, []
            self._write(rows)
        if self._problem is None:
            return None
        return f"{self._num_lost} decisions of this run are not in the experience: {self._problem}"

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _close_row(self, reward: float, end: Mapping[str, Any] | None = None) -> None:
        """The decision before is complete with the reward that came of it."""
        if self._open is None:
            return
        (moment, advance), self._open, about = self._open, None, self._about
        self._rows.append(
            {
                "version": EXPERIENCE_VERSION,
                "run_id": about.run_id,
                "life": self._life,
                "written_at": now(),
                "epoch": moment.epoch,
                "moment": moment,
                "policy": about.policy,
                "policy_version": about.policy_version,
                "seed": about.seed,
                "task": about.task,
                "host": about.host,
                "reward": advance + reward,
                "reward_version": REWARD_VERSION,
                "done": False,
                "last": None,
                "ended": None,
                **(end or {}),
            }
        )

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        try:
            _append(self._storage, _table_of(rows, self._about))
        except Exception as error:  # noqa: BLE001 - the edge of the writer's thread: what is lost must be said
            self._problem, self._num_lost = " ".join(str(error).split())[:300], self._num_lost + len(rows)
            _log.warning("experience.unwritten", extra={"run": self._about.run_id, "reason": self._problem})


def append_episode(storage: Storage, episode: Episode, prices: RewardConfig) -> None:
    """Writes an episode that is over, in one commit.

    Raises:
        StorageError: if it cannot be written.
    """
    log = ExperienceWriter(storage, episode.about, SimicConfig(rows_per_write=1 << 30, reward=prices))
    for moment in episode.moments:
        log.decided(moment.state, moment.packet, moment.signal)
    problem = log.close(episode.last, episode.ended, is_over=episode.is_over)
    if problem is not None:
        raise StorageError(problem, field="storage")


def _table_of(rows: Sequence[dict[str, Any]], about: About) -> pa.Table:
    """Rows as a table; what is JSON is written here, in the writer's thread."""
    told = json.dumps({name: getattr(about, name) for name in About.__slots__})
    whole = [
        {
            **{key: value for key, value in row.items() if key != "moment"},
            "about": told,
            "state": json.dumps(row["moment"].state),
            "packet": row["moment"].packet.model_dump_json(),
            "signal": row["moment"].signal.model_dump_json(),
        }
        for row in rows
    ]
    return pa.Table.from_pylist(whole, schema=_SCHEMA)


def _append(storage: Storage, data: pa.Table) -> None:
    """One commit. Where two runs make the table at a time, the second tries again and finds it."""
    for left in reversed(range(_TRIES)):
        try:
            write_deltalake(
                storage.child(TABLE), data, mode="append", schema_mode="merge", storage_options=storage.delta_options
            )
        except DeltaError:
            if not left:
                raise
        else:
            return


# ---------------------------------------------------------------- reading


class Experience:
    """The experience below a storage.

    Args:
        storage: the address.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def episodes(
        self, *, policies: Sequence[str] | None = None, runs: Sequence[str] | None = None, only_whole: bool = True
    ) -> Iterator[Episode]:
        """Yields episodes, the oldest first.

        Args:
            policies: only of these; None for all.
            runs: likewise, by id.
            only_whole: leave out those whose end is missing.

        Raises:
            StorageError: if the table cannot be read.
        """
        found = self._read(policies, runs)
        by_run: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(found.to_pylist(), key=lambda row: row["written_at"]):
            by_run.setdefault(row["run_id"], []).append(row)
        for rows in by_run.values():
            episode = _episode(rows)
            if episode.is_over or not only_whole:
                yield episode

    def tidy(self, *, kept_hours: float = 24.0) -> Tidied | None:
        """Puts many files into few; None where there is no table. Gives way to whoever writes."""
        table = self._open()
        return None if table is None else tidy(self._storage, TABLE, table, kept_hours)

    def _open(self) -> DeltaTable | None:
        try:
            return DeltaTable(self._storage.child(TABLE), storage_options=self._storage.delta_options)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            raise self._storage.failure("read", error, TABLE) from error

    def _read(self, policies: Sequence[str] | None, runs: Sequence[str] | None) -> pa.Table:
        table = self._open()
        if table is None:
            return _SCHEMA.empty_table()
        wanted = [("policy", policies), ("run_id", runs)]
        filters = [(name, "in", list(values)) for name, values in wanted if values is not None]
        try:
            return table.to_pyarrow_table(filters=filters or None)
        except (DeltaError, OSError, pa.ArrowException) as error:
            raise self._storage.failure("read", error, TABLE) from error


def _episode(rows: Sequence[dict[str, Any]]) -> Episode:
    """The episode of a run's rows, in the order they were written.

    What a resumed run did again counts in place of what it did before, and all that lay beyond is dropped with it. A
    row that came twice, since its commit was tried again, counts once.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        if kept and row["life"] != kept[-1]["life"]:
            kept = [known for known in kept if known["epoch"] < row["epoch"]]
        kept.append(row)
    kept = [row for _, row in sorted({row["epoch"]: row for row in kept}.items())]
    newest = kept[-1]
    reports = json.loads(newest["ended"]) if newest["done"] else []
    return Episode(
        about=About(**json.loads(newest["about"])),
        moments=tuple(
            Moment(
                json.loads(row["state"]),
                SystemStatePacket.model_validate_json(row["packet"]),
                AdaptationSignal.model_validate_json(row["signal"]),
            )
            for row in kept
        ),
        last=EpochRecord.model_validate_json(newest["last"]) if newest["done"] and newest["last"] else None,
        ended=tuple(FieldReport.model_validate(report) for report in reports),
        is_over=newest["done"],
        gains=tuple(row["reward"] for row in kept),
    )
