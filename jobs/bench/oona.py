"""The bus beside a real `redis-server`, side by side in one run: signals a second from end to end, latency at paced
rates, CPU seconds a million signals, and scaling over shards and consumers.

Redis keeps streams with consumer groups and acknowledgements, its AOF synced every second; packed has 256 messages in
an entry, pipelined one, 256 entries a pipeline. Oona has its log, synced every 200 ms. All carry the same messages in
the same encoding, and all ends decode what they get. Without redis-server only Oona is measured, and it is said.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from esper.config import OonaConfig
from jobs.bench import Say
from jobs.bench.harness import BenchResult, Goal, machine, median_interval
from jobs.bench.stream_ends import Ends, OonaEnds, Peer, Received, RedisEnds, Sent, cpu_seconds

OONA, PACKED, PIPELINED = "oona", "redis packed", "redis pipelined"
FLAT_OUT_GOAL, P99_GOAL_MS, P99_RATE = 150_000.0, 20.0, 50_000
PIPELINED_GOAL, PACKED_GOAL = 2.0, 3.0
WAIT_S = 300.0


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures everything; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench oona", description=__doc__)
    parser.add_argument("--messages", type=int, default=400_000, help="of a turn flat out (default 400000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a paced turn (default 5)")
    parser.add_argument("--rates", default="1000,10000,50000,100000", help="signals a second, by commas")
    options = parser.parse_args(arguments)
    rates = [int(rate) for rate in options.rates.split(",")]
    from actors.cluster import connected

    with connected(dashboard=False), _Contest(say) as contest:
        flat = contest.flat_out(options.messages, options.rounds)
        paced = contest.paced(rates, options.seconds, max(1, options.rounds // 2))
        scaling = contest.scaling(options.messages, options.rounds)
    here = machine()
    goals = _goals(flat, paced)
    missing = "" if contest.has_redis else "Redis was not measured: no redis-server, or no Python client here. "
    verdict = f"{missing}CPU seconds are of the broker and of both ends, which encode and decode."
    parts = (
        BenchResult(name="flat out", machine=here, rows=tuple(_flat_row(*item) for item in flat.items())),
        BenchResult(name="paced", machine=here, rows=tuple(paced)),
        BenchResult(name="scaling", machine=here, rows=tuple(scaling)),
    )
    return BenchResult(name="oona", machine=here, goals=tuple(goals), verdict=verdict, parts=parts)


class _Contest:
    """The streams and the processes at their ends; a context."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.has_redis = shutil.which("redis-server") is not None and find_spec("redis") is not None

    def __enter__(self) -> Self:
        import ray

        self._folder = tempfile.TemporaryDirectory(prefix="esper-bench-")
        self._root = Path(self._folder.name)
        cls = ray.remote(Peer).options(num_cpus=0)
        self._senders: list[Any] = [cls.remote(f"run-{number}") for number in range(2)]
        self._receivers: list[Any] = [cls.remote("") for _ in range(2)]
        ray.get([peer.close.remote() for peer in (*self._senders, *self._receivers)], timeout=WAIT_S)
        self._num_turns = 0
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for peer in (*self._senders, *self._receivers):
            ray.kill(peer)
        self._folder.cleanup()

    @property
    def names(self) -> list[str]:
        return [OONA, *([PACKED, PIPELINED] if self.has_redis else [])]

    def flat_out(self, count: int, rounds: int) -> dict[str, list[dict[str, float]]]:
        """By stream, a row of figures a turn; the first of each only warms up."""
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in self.names}
        for number in range(rounds + 1):
            for name in self.names:
                size = count if name != PIPELINED else count // 4
                turn = self._turn(name, _flat_out_of(size))
                if number:
                    turns[name].append(turn)
                    self._say(f"flat out, round {number}: {name} {turn['rate']:,.0f} signals/s")
        return turns

    def paced(self, rates: Sequence[int], seconds: float, rounds: int) -> list[dict[str, Any]]:
        rows = []
        for rate in rates:
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in self.names}
            for _ in range(rounds):
                for name in self.names:
                    turns[name].append(self._turn(name, _paced_at(rate, seconds)))
            for name in self.names:
                found = _medians(turns[name], "rate", "p50_ms", "p99_ms", "cpu_s")
                row = {"rate": rate, "stream": name, "reached": found.pop("rate"), **found}
                rows.append(row)
                self._say(f"{rate}/s: {name} p50 {row['p50_ms']:.1f} ms, p99 {row['p99_ms']:.1f} ms")
        return rows

    def scaling(self, count: int, rounds: int) -> list[dict[str, Any]]:
        rows = []
        for shards, ends in ((1, 1), (1, 2), (2, 1), (2, 2)):
            turns = [
                self._turn(OONA, _flat_out_of(count // ends), shards=shards, ends=ends)
                for _ in range(max(1, rounds // 2))
            ]
            row = {"shards": shards, "producers": ends, "consumers": ends, **_medians(turns, "rate", "cpu_s")}
            rows.append(row)
            self._say(f"{shards} shards, {ends} producers and consumers: {row['rate']:,.0f} signals/s")
        return rows

    def _turn(self, name: str, send: Callable[[Any], Any], *, shards: int = 1, ends: int = 1) -> dict[str, float]:
        """One stream, fresh; figures of all its ends together."""
        import ray

        self._num_turns += 1
        wanted = self._root / f"turn-{self._num_turns}"
        with self._stream(name, shards) as (make, brokers):
            senders, receivers = self._senders[:ends], self._receivers[:ends]
            ray.get([peer.open.remote(partial(make, "bench")) for peer in receivers], timeout=WAIT_S)
            ray.get([peer.open.remote(partial(make, None)) for peer in senders], timeout=WAIT_S)
            before = sum(map(cpu_seconds, brokers))
            receiving = [peer.receive.remote(str(wanted)) for peer in receivers]
            sent: list[Sent] = ray.get([send(peer) for peer in senders], timeout=WAIT_S)
            total = sum(one.count for one in sent)
            wanted.with_suffix(".new").write_text(str(total))
            wanted.with_suffix(".new").rename(wanted)
            received: list[Received] = ray.get(receiving, timeout=WAIT_S)
            cpu_s = sum(map(cpu_seconds, brokers)) - before
            ray.get([peer.close.remote() for peer in (*receivers, *senders)], timeout=WAIT_S)
        latencies = sorted(latency for one in received for latency in one.latencies)
        seconds = max(one.ended for one in received) - min(one.began for one in sent)
        ends_cpu_s = sum(one.cpu_s for one in (*sent, *received))
        return {
            "rate": total / seconds,
            "p50_ms": 1e3 * statistics.median(latencies),
            "p99_ms": 1e3 * latencies[int(0.99 * (len(latencies) - 1))],
            "broker_cpu_s": cpu_s / total * 1e6,
            "cpu_s": (cpu_s + ends_cpu_s) / total * 1e6,
        }

    @contextmanager
    def _stream(self, name: str, shards: int) -> Iterator[tuple[Callable[[str | None], Ends], list[int]]]:
        """How a process opens an end, by its group, and the brokers' processes."""
        folder = self._root / f"stream-{self._num_turns}"
        folder.mkdir()
        if name == OONA:
            import ray

            from actors import oona

            config = OonaConfig(num_shards=shards, drop_oldest=())
            handle = oona.spawn(config, folder, prefix=f"bench-{self._num_turns}")
            actors: Sequence[Any] = handle.shards
            infos = ray.get([shard.describe.remote() for shard in actors], timeout=WAIT_S)
            try:
                yield partial(OonaEnds, handle), [info.pid for info in infos]
            finally:
                handle.stop()
        else:
            with _redis(folder) as (socket, pid):
                yield partial(RedisEnds, socket, packed=name == PACKED), [pid]
        shutil.rmtree(folder)


def _flat_out_of(count: int) -> Callable[[Any], Any]:
    return lambda peer: peer.send_flat_out.remote(count)


def _paced_at(rate: float, seconds: float) -> Callable[[Any], Any]:
    return lambda peer: peer.send_paced.remote(rate, seconds)


@contextmanager
def _redis(folder: Path) -> Iterator[tuple[str, int]]:
    """A server of its own, on a socket."""
    import redis

    socket = str(folder / "redis.sock")
    command = ["redis-server", "--port", "0", "--unixsocket", socket, "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 -- the words are our own
    try:
        client = redis.Redis(unix_socket_path=socket)
        ends = time.monotonic() + WAIT_S
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > ends or process.poll() is not None:
                    raise
                time.sleep(0.02)
        client.close()
        yield socket, process.pid
    finally:
        process.terminate()
        process.wait(WAIT_S)


def _medians(turns: Sequence[dict[str, float]], *names: str) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in names}


def _flat_row(name: str, turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    medians = _medians(turns, "rate", "broker_cpu_s", "cpu_s")
    rate = median_interval([turn["rate"] for turn in turns])
    return {
        "stream": name,
        "signals/s": medians["rate"],
        "95% interval": f"{rate.low:,.0f} to {rate.high:,.0f}",
        "CPU s a million": medians["cpu_s"],
        "the broker's": medians["broker_cpu_s"],
    }


def _goals(flat: dict[str, list[dict[str, float]]], paced: Sequence[dict[str, Any]]) -> list[Goal]:
    rates = [turn["rate"] for turn in flat[OONA]]
    goals = [_at_least("signals/s flat out", rates, FLAT_OUT_GOAL)]
    p99 = [row["p99_ms"] for row in paced if (row["stream"], row["rate"]) == (OONA, P99_RATE)]
    if p99:
        goals.append(
            Goal(
                name=f"p99 ms at {P99_RATE}/s", value=p99[0], goal=P99_GOAL_MS, met=p99[0] < P99_GOAL_MS,
                interval=(min(p99), max(p99)),
            )
        )  # fmt: skip
    if PIPELINED in flat:
        pairs = [ours / turn["rate"] for ours, turn in zip(rates, flat[PIPELINED], strict=True)]
        goals.append(_at_least("times redis pipelined", pairs, PIPELINED_GOAL))
        pairs = [turn["rate"] / ours for ours, turn in zip(rates, flat[PACKED], strict=True)]
        behind = median_interval(pairs)
        goals.append(
            Goal(
                name="redis packed is ahead by", value=behind.value, goal=PACKED_GOAL, met=behind.high <= PACKED_GOAL,
                interval=(behind.low, behind.high),
            )
        )  # fmt: skip
    return goals


def _at_least(name: str, samples: Sequence[float], goal: float) -> Goal:
    """Met when the whole interval reaches it."""
    found = median_interval(samples)
    return Goal(name=name, value=found.value, goal=goal, met=found.low >= goal, interval=(found.low, found.high))
