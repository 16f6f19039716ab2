"""Plans that kill Urza under its clients, and what must hold after each.

A plan is drawn from its number: where the kill hits (at a random moment, or at a place in Urza's own work), and whether
its successor is killed as well. A soak runs many plans over one storage, one after the other, beside a program that
reads the tables all the time. Its results are lines of a file: a soak that is killed itself goes on after the last one,
on a fresh storage.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import table_reader
from urza_clients import PATIENCE_S, SIGNATURES, Client, Handle

from actors import urza
from esper.leyline import EsperError, FencedError, KernelStatus, UnavailableError, keys
from esper.leyline.catalogue import BlueprintQuery, KernelQuery
from esper.storage import Storage
from esper.urza import upkeep
from esper.urza.blobs import StoredBlobs
from esper.urza.catalog import TargetState
from esper.urza.hub import Hub
from esper.urza.reading import Reader

NUM_CLIENTS = 8
IMPATIENT_S = {0: 0.3, 1: 1.0}
"""Deadlines of the clients that give up; the others wait."""
WARM_UP = 2
"""Writes that each patient client must have been acknowledged before a kill, and after it."""
WAIT_S = 240.0
"""For whatever must happen; nothing is decided by how long it takes."""

ANY = "any"
UPKEEP = "upkeep"
PLACES = ("stored", "committing", "committed", "sweeping", "projecting", "compacted", "checkpointed", "vacuumed")


@dataclass(frozen=True)
class Plan:
    """What is done to Urza.

    Attributes:
        number: its seed.
        place: `any`: at a random moment; `upkeep`: at a random moment of maintenance; else a place of `Hub`.
        delay_s: from the last client's warm-up (the start of maintenance) to the kill, or to its being armed.
        within_s: from the place to the kill: what begins there is under way then.
        again: whether the successor is killed too, as it takes over.
    """

    number: int
    place: str
    delay_s: float
    within_s: float
    again: bool

    @classmethod
    def drawn(cls, number: int) -> Plan:
        """The plan of a number: each place comes once in ten, the random moments and second kills are drawn."""
        draw = random.Random(f"kill-{number}")
        place = (ANY, UPKEEP, *PLACES)[number % 10]
        delay_s, again = draw.uniform(0.0, 0.4 if place == UPKEEP else 1.5), draw.random() < 0.2
        return cls(number, place, delay_s, draw.choice((0.0, draw.uniform(0.0, 0.1))), again)


@dataclass(frozen=True)
class KillWhenArmed:
    """A `FaultPlan` for Urza's process: a place with a file of its name is deadly once, after the file's seconds."""

    folder: Path

    def at(self, place: str, step: int) -> None:
        del step
        try:
            fired = (self.folder / place).rename(self.folder / f"{place}.fired.{os.getpid()}")
        except FileNotFoundError:
            return
        if within_s := float(fired.read_text()):
            threading.Timer(within_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def arm(self, place: str, within_s: float = 0.0) -> None:
        """Makes a place deadly."""
        draft = self.folder / f"{place}.draft"
        draft.write_text(repr(within_s))
        draft.rename(self.folder / place)

    def fired(self, place: str) -> set[int]:
        """The processes that died there, or are about to."""
        return {int(path.name.rpartition(".")[2]) for path in self.folder.glob(f"{place}.fired.*")}


@dataclass(frozen=True)
class Row:
    """What a plan came to.

    Attributes:
        kills: processes of Urza that died.
        acknowledged, unanswered: writes and requests of all clients since the storage was new.
        events, kernels: in the log.
        restart_s: from the last kill until Urza answered.
        lost_s: the longest in which no client was told of a durable write, from the kill on.
    """

    plan: int
    place: str
    kills: int
    acknowledged: int
    unanswered: int
    events: int
    kernels: int
    restart_s: float
    lost_s: float


class Soak:
    """Plans over one storage.

    Args:
        storage: empty.
        folder: for the files of the soak itself.
        segment: a name for this storage.
    """

    def __init__(self, storage: Storage, folder: Path, segment: str) -> None:
        folder.mkdir(parents=True)
        self._storage = storage
        self._folder = folder
        self._faults = KillWhenArmed(folder / "armed")
        self._faults.folder.mkdir()
        self.hub = urza.spawn(storage.uri, storage.options, num_cpus=0.01, deadline_s=PATIENCE_S, faults=self._faults)
        key = keys.load_or_create(folder / "key.pem")
        self.clients = [
            Client(number, Handle(self.hub._actor, deadline_s=IMPATIENT_S.get(number, PATIENCE_S)), key, segment)
            for number in range(NUM_CLIENTS)
        ]
        self._log = table_reader.Log()
        self._checked: set[str] = set()  # blobs

    # ------------------------------------------------------------ a plan

    def run(self, plan: Plan) -> Row:
        """Carries a plan out and checks everything.

        Raises:
            AssertionError: if anything acknowledged is not there, or anything is half there.
        """
        pid = self.hub.ready()
        dead = {pid}
        with self._working(), self._maintained():
            self._wait(self._each_acknowledged_since(time.time()))
            if plan.again:
                self._faults.arm("taking_over")
            if plan.place in PLACES:
                time.sleep(plan.delay_s)
                self._faults.arm(plan.place, plan.within_s)
                # what a crash leaves, so that there is something to sweep
                StoredBlobs(self._storage).put(f"left before the kill of plan {plan.number}".encode())
                self._wait(lambda: pid in self._faults.fired(plan.place))
            else:
                self._kill_after(plan.delay_s, pid, in_upkeep=plan.place == UPKEEP)
            self._wait(lambda: _is_dead(pid))
            killed_at = last = time.time()
            if plan.again:
                self._wait(lambda: self._faults.fired("taking_over") - dead)
                dead |= self._faults.fired("taking_over")
                self._wait(lambda: all(map(_is_dead, dead)))
                last = time.time()
            successor = self.hub.ready()
            restart_s = time.time() - last
            assert successor not in dead, "Urza was not killed"
            assert len(dead) == 1 + plan.again
            self._wait(self._each_acknowledged_since(time.time()))
        times = sorted(at for client in self.clients for at in client.acknowledged_at)
        lost_s = max(after - before for before, after in pairwise(times) if after > killed_at)
        self.check()
        for path in self._faults.folder.glob("*.fired.*"):
            path.unlink()
        return Row(
            plan.number, plan.place, len(dead), sum(client.ledger.num_acknowledged for client in self.clients),
            sum(client.ledger.unanswered.total() for client in self.clients), len(self._log.rows),
            len(self._log.ids.get("kernel.stored", ())), round(restart_s, 2), round(lost_s, 2),
        )  # fmt: skip

    def _kill_after(self, delay_s: float, pid: int, *, in_upkeep: bool) -> None:
        if in_upkeep:
            began = self._rounds
            self._wait(lambda: self._rounds > began)
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """All clients work meanwhile."""
        stop = threading.Event()
        threads = [threading.Thread(target=client.run, args=(stop,)) for client in self.clients]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            # what is written from here on would be in one look at the storage, and not in the one before
            for client in self.clients:
                client.settle(WAIT_S)
            self._raise_problems()

    @contextmanager
    def _maintained(self) -> Iterator[None]:
        """Maintenance runs all the time meanwhile, and keeps nothing that is not needed."""
        stop, problems = threading.Event(), []
        self._rounds = 0

        def maintain() -> None:
            while not stop.wait(0.3):
                self._rounds += 1
                try:
                    report = self.hub.maintain(kept_hours=0.0, grace_hours=0.0)
                    problems.extend(report.problems)
                    self.hub.close()
                except UnavailableError:
                    continue  # it was killed meanwhile
                except EsperError as error:
                    problems.append(str(error))

        thread = threading.Thread(target=maintain)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert problems == []

    def _each_acknowledged_since(self, moment: float) -> Callable[[], bool]:
        patient = [client for number, client in enumerate(self.clients) if number not in IMPATIENT_S]

        def done() -> bool:
            self._raise_problems()
            return all(sum(at > moment for at in client.acknowledged_at) >= WARM_UP for client in patient)

        return done

    def _raise_problems(self) -> None:
        for client in self.clients:
            if client.problem is not None:
                raise client.problem

    def _wait(self, done: Callable[[], Any]) -> None:
        until = time.monotonic() + WAIT_S
        while not done():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.02)

    # ------------------------------------------------------------ what must hold

    def check(self, *, every_blob: bool = False) -> None:
        """Every acknowledged write is in the table read without Esper, in Urza as it answers, and in its log read anew.

        Args:
            every_blob: whether blobs that were checked before are checked again.
        """
        self.hub.close()  # writes the tables for others
        rows = sorted(self._read("events"), key=lambda row: row["seq"])
        self._log.take(rows)
        found = {(row["kind"], row["id"]) for row in rows}
        lost = set().union(*(client.ledger.rows() for client in self.clients)) - found
        assert not lost, f"acknowledged and not in the table: {sorted(lost)[:5]}"
        stored = self._log.ids.get("kernel.stored", set())
        folder = self._storage.path("blobs")
        for digest in stored if every_blob else stored - self._checked:
            table_reader.check_blob(self._storage.fs, folder, digest)
        self._checked |= stored
        assert table_reader.check_table(self._read("kernels"), "kernel_id") == stored
        names = self._log.ids.get("blueprint.submitted", set())
        assert table_reader.check_table(self._read("blueprints"), "blueprint_id") == names
        self._check_answers(self.hub)
        self._check_answers(Reader.of(self._storage))

    def _check_answers(self, hub: Any) -> None:
        """What one who answers queries must say."""
        kernels = dict(_pages(hub))
        assert kernels.keys() == self._log.ids.get("kernel.stored", set())
        counted: dict[str, int] = {}
        for client in self.clients:
            for kernel_id in client.ledger.reports.values():
                counted[kernel_id] = counted.get(kernel_id, 0) + 1
            for kernel_id in client.ledger.retired_kernels:
                assert kernels[kernel_id].kernel.status is KernelStatus.RETIRED
        for kernel_id, number in counted.items():
            assert kernels[kernel_id].statistics.num_reports >= number
        reported = sum(entry.statistics.num_reports for entry in kernels.values())
        assert reported == len(self._log.ids.get("kernel.reported", ()))  # none counts twice
        everything = _blueprints(hub)
        assert everything.keys() == self._log.ids.get("blueprint.submitted", set())
        for client in self.clients:
            for blueprint_id, (name, num_targets) in client.ledger.blueprints.items():
                assert everything[blueprint_id].name == name
                assert len(everything[blueprint_id].targets) == num_targets
        self._check_work(hub)

    def _check_work(self, hub: Any) -> None:
        targets = (
            {
                target.job_id: target
                for client in self.clients
                for blueprint_id in client.ledger.blueprints
                for target in hub.targets(blueprint_id)
            }
            if isinstance(hub, Reader)
            else {}
        )  # fmt: skip - one call a blueprint: not through the actor
        for client in self.clients:
            for kernel_id, job_id in client.ledger.kernels.items():
                assert job_id not in targets or kernel_id in targets[job_id].kernel_ids
            for job_id, reason in client.ledger.failed.items():
                if job_id in targets:
                    assert (targets[job_id].state, targets[job_id].reason) == (TargetState.FAILED, reason)

    def _read(self, table: str) -> list[dict[str, Any]]:
        return table_reader.read_rows(self._storage.child(table), self._storage.delta_options)

    def finish(self) -> Hub:
        """Takes the storage over from the actor, checks everything in a hub of one's own, and ends the actor."""
        self.check(every_blob=True)
        hub = Hub.open(self._storage)
        try:
            self.hub.submit_blueprint(self.clients[0]._design(), name="fenced", targets=SIGNATURES)
        except FencedError:
            pass  # as it must
        else:
            raise AssertionError("two Urzas write")
        ray.kill(self.hub._actor)
        self._check_answers(hub)
        for _ in range(2):  # what one round sets aside, the next removes
            report = upkeep.maintain(hub, self._storage, kept_hours=0.0, grace_hours=0.0)
            assert report.problems == ()
        assert StoredBlobs(self._storage).aside() == []
        kept = {blob.digest for blob in StoredBlobs(self._storage).stored()}
        assert kept == self._log.ids.get("kernel.stored", set())
        self._check_no_litter()
        return hub

    def _check_no_litter(self) -> None:
        """What killed writers left is gone."""
        drafts = [
            f"{folder}/{name}"
            for folder in self._storage.names("blobs")
            for name, _, _ in self._storage.listing(f"blobs/{folder}")
            if name.startswith(".")
        ]
        probes = [name for name in self._storage.names() if name.startswith(".")]
        assert drafts + probes == []
        for table in ("events", "blueprints", "kernels"):
            files = {name for name, _, _ in self._storage.listing(table)}
            named = {
                uri.rsplit("/", 1)[-1]
                for uri in table_reader.files(self._storage.child(table), self._storage.delta_options)
            }
            assert files == named, f"the table {table} has files that no commit names"


def _is_dead(pid: int) -> bool:
    """Whether the process has ended; its parent may not know yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _pages(hub: Any) -> Iterator[tuple[str, Any]]:
    offset = 0
    while True:
        page = hub.search_kernels(KernelQuery(status=None, limit=1000, offset=offset))
        yield from ((entry.kernel.kernel_id, entry) for entry in page.kernels)
        offset += len(page.kernels)
        if offset >= page.total or not page.kernels:
            return


def _blueprints(hub: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while True:
        page = hub.search_blueprints(BlueprintQuery(limit=1000, offset=len(found)))
        found |= {one.blueprint_id: one for one in page.blueprints}
        if len(found) >= page.total or not page.blueprints:
            return found


@contextmanager
def table_reader_beside(storage: Storage, folder: Path) -> Iterator[None]:
    """A process that reads the tables meanwhile; it must have seen them, and nothing that is not whole."""
    options = {}
    if not storage.is_local:
        given = storage.options
        options = {
            "endpoint_url": given["endpoint_url"], "key": given["key"], "secret": given["secret"],
            "use_listings_cache": False,
        }  # fmt: skip
    places = {table: storage.child(table) for table in ("events", "blueprints", "kernels")}
    request = {
        **places, "blobs": storage.path("blobs"), "delta_options": storage.delta_options, "fsspec_options": options
    }  # fmt: skip
    stop, result, said = folder / "stop", folder / "read.json", folder / "reader.log"
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, table_reader.__file__, json.dumps(request), stop, result], stderr=output, stdout=output
        )
    try:
        yield
    finally:
        stop.touch()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 0, said.read_text()
    seen = json.loads(result.read_text())
    assert seen.get("tables", 0) > 0
    assert seen["blobs"] > 0


def soak(
    storage_of: Callable[[str], Storage], folder: Path, numbers: Sequence[int], say: Callable[[str], None]
) -> list[Row]:
    """Runs the plans that are not in `folder/results.jsonl` yet; returns the rows of all.

    Args:
        storage_of: gives an empty storage for a name.
        folder: keeps the results.
        numbers: of the plans.
        say: is told each line of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    rows = [Row(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    done = {row.plan for row in rows}
    left = [number for number in numbers if number not in done]
    say(table_line(*Row.__dataclass_fields__))
    for row in rows:
        say(table_line(*vars(row).values()))
    if not left:
        return rows
    segment = f"from-{left[0]}-{int(time.time())}"
    storage = storage_of(segment)
    run = Soak(storage, folder / segment, segment)
    with table_reader_beside(storage, folder / segment):
        for number in left:
            row = run.run(Plan.drawn(number))
            with results.open("a") as file:
                file.write(json.dumps(vars(row)) + "\n")
            rows.append(row)
            say(table_line(*vars(row).values()))
    run.finish()
    return rows


def table_line(*values: Any) -> str:
    """A line of the table of results."""
    return "| " + " | ".join(f"{value!s:>12}" for value in values) + " |"
