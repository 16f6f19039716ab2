"""`esper bus`: looks at the bus of a running platform, at the log of one that does not run, and at the archive. Looking
joins no group, so it changes and holds up nothing. `repair` is for a bus that does not run, as its log is damaged.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper.leyline.bus import DeadLetter
from esper.leyline.errors import ConfigError, FencedError, NotFoundError, UnavailableError
from jobs.assets import NoPlatformError
from jobs.tables import table

if TYPE_CHECKING:
    from esper.leyline.messages import Topic
    from esper.leyline.ports import Bus, Delivery
    from esper.oona import StandingBus
    from esper.oona.story import Story
    from esper.storage import Storage as Place

REMEDY = "ray start --head, then RAY_ADDRESS=auto esper platform up"
RUNS = "put RAY_ADDRESS=auto before the command; where several Rays run, the address of that one"
STANDS = "the bus does not run; this is what its log holds"
NUM_NAMED = 2
"""Topics that a table names; of a group with more it tells how many."""
POLL_S = 0.5
"""Between two looks of `tail --follow`."""

bus_app = typer.Typer(
    help="Look at the message bus of a run or platform, also when it is over, or repair its log.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON; `tail` prints one object a line.")]
Storage = Annotated[
    str,
    typer.Option("--storage", envvar="ESPER_STORAGE", help="Whose platform: a directory, file:// or s3:// address."),
]


# ---------------------------------------------------------------- commands


@bus_app.command("topics")
def topics(storage: Storage = "~/.esper", as_json: Json = False) -> None:
    """List the topics: messages published, kept, and how old those are."""
    with opened(storage) as bus:
        rows = topic_rows(bus)
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows, "no message was published yet"))


@bus_app.command("stats")
def stats(storage: Storage = "~/.esper", as_json: Json = False) -> None:
    """List the consumer groups: how far behind they are, and what was repeated, dropped or given up."""
    with opened(storage) as bus:
        rows = group_rows(bus)
    if not as_json:
        rows = [{**row, "topics": _few(row["topics"])} for row in rows]
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows, "no group reads the bus"))


@bus_app.command("tail")
def tail(
    topic: Annotated[list[str] | None, typer.Option(help="Only this topic; may be repeated.")] = None,
    key: Annotated[str | None, typer.Option(help="Only messages with this key, such as a run id.")] = None,
    since: Annotated[float | None, typer.Option(min=0.0, help="Begin so many seconds ago.")] = None,
    offset: Annotated[list[str] | None, typer.Option(metavar="SHARD:OFFSET", help="Begin here.")] = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin with the oldest message kept.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many messages.")] = None,
    storage: Storage = "~/.esper",
    as_json: Json = False,
) -> None:
    """Print messages: those that come from now on, or those kept since a place, and with --follow both."""
    from esper.oona import StandingBus

    wanted = parse_topics(topic or ())
    if from_start + (since is not None) + bool(offset) > 1:
        raise ConfigError("more than one place to begin", remedy="one of --from-start, --since and --offset")
    starts_now = not (from_start or offset or since is not None)
    positions = {} if starts_now else parse_offsets(offset or ()) or None
    from_time = None if since is None else time.time() - since
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    with opened(storage) as bus:
        if (starts_now or follow) and isinstance(bus, StandingBus):
            raise NoPlatformError("the bus does not run, so nothing comes", remedy="--from-start, --since or --offset")
        _check_shards(bus, positions or ())
        lines = messages(
            bus, wanted, key=key, positions=positions, from_time=from_time, follow=follow or starts_now, limit=limit
        )
        for row in lines:
            typer.echo(json.dumps(row) if as_json else line(row)[:width])


@bus_app.command("requeue")
def requeue(
    group: Annotated[str | None, typer.Option(help="Only what this group gave up.")] = None,
    letter: Annotated[
        list[str] | None, typer.Option(metavar="SHARD:OFFSET", help="Only this letter, as `tail` shows it.")
    ] = None,
    storage: Storage = "~/.esper",
    as_json: Json = False,
) -> None:
    """Give messages that a group gave up to that group again; no other group gets them.

    What was given up: esper bus tail --topic system.dead_letters --from-start
    """
    from esper.oona import StandingBus

    places = {place for text in letter or () for place in parse_offsets((text,)).items()}
    with opened(storage) as bus:
        if isinstance(bus, StandingBus):
            raise NoPlatformError("the bus does not run, so nobody would get them", remedy=REMEDY)
        rows = requeue_rows(bus, group=group, places=places)
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows, "nothing was given up"))


@bus_app.command("story")
def story(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id, a unique beginning of one, or `latest`.")],
    storage: Storage = "~/.esper",
    as_json: Json = False,
) -> None:
    """Tell a run's story from the archive alone: no platform, and none of the run's own files, is needed for it."""
    from esper.leyline.messages import Topic
    from esper.oona.archive import read_archive
    from esper.oona.story import story_of
    from esper.storage import Storage as Place

    place = Place.at(storage)
    run = archived_run(run, [row.message.key for row in read_archive(place, [Topic.RUN_STARTED])])
    told = story_of(run, (row.message for row in read_archive(place, key=run)))
    rows = event_rows(told)
    if not as_json:  # people count epochs from 1
        rows = [{**row, "epoch": row["epoch"] + 1} for row in rows]
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows, "nothing grew"))


@bus_app.command("repair")
def repair(storage: Storage = "~/.esper", as_json: Json = False) -> None:
    """Cut out of the bus's log what cannot be read, where the bus refuses it; the segment as it was is set aside.

    On the node where the platform ran, while it is down. What else is in the log comes again, some of it twice.
    """
    from esper.oona.log import directory_of
    from esper.oona.repair import repair as repaired
    from esper.storage import Storage as Place

    directory = directory_of(Place.at(storage))
    logs = sorted(directory.glob("shard-*-of-*"))
    if not logs:
        raise NotFoundError(f"{directory} holds no log of a bus", remedy="ask on the node where the platform ran")
    cuts = [cut for log in logs for cut in repaired(log)]
    rows = [{**cut._asdict(), "path": str(cut.path), "original": str(cut.original)} for cut in cuts]
    typer.echo(json.dumps(rows, indent=2) if as_json else table(rows, "nothing is damaged"))


# ---------------------------------------------------------------- what they show


@contextlib.contextmanager
def opened(storage: str) -> Iterator[Bus | StandingBus]:
    """The bus of the platform that serves this storage, or where no cluster is named the log of one that is over.

    Raises:
        NoPlatformError: if there is none, or it runs and no cluster is named.
    """
    from esper.storage import Storage as Place

    place = Place.at(storage)
    if not os.environ.get("RAY_ADDRESS"):
        with contextlib.closing(_standing(place)) as standing:
            typer.echo(STANDS, err=True)
            yield standing
        return
    from actors.cluster import connected

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(connected())
        except UnavailableError as error:
            raise NoPlatformError(error.message, remedy=error.remedy) from error
        from actors import oona  # imports Ray, whose settings come first

        try:
            bus = oona.connect(f"oona-{place.key}").bus()
        except NotFoundError as error:
            raise NoPlatformError(f"no platform is up for {place.shown}", field="storage", remedy=REMEDY) from error
        stack.callback(bus.close)
        yield bus


def _standing(place: Place) -> StandingBus:
    from esper.oona import StandingBus
    from esper.oona.log import directory_of

    try:
        return StandingBus(directory_of(place))
    except FencedError as error:
        raise NoPlatformError("the bus runs, and RAY_ADDRESS does not say where", remedy=RUNS) from error
    except NotFoundError as error:
        what = f"RAY_ADDRESS is not set, and no bus ever ran for {place.shown} on this node"
        raise NoPlatformError(what, field="storage", remedy=REMEDY) from error


def topic_rows(bus: Bus | StandingBus) -> list[dict[str, Any]]:
    """One row a topic."""
    return [topic.model_dump(mode="json") for topic in bus.stats().topics]


def group_rows(bus: Bus | StandingBus) -> list[dict[str, Any]]:
    """One row a group, those that are furthest behind first."""
    groups = sorted(bus.stats().groups, key=lambda group: -group.pending)
    return [group.model_dump(mode="json") for group in groups]


def requeue_rows(bus: Bus, *, group: str | None, places: Collection[tuple[int, int]] = ()) -> list[dict[str, Any]]:
    """Gives groups again what they gave up; one row a group.

    Args:
        bus: where.
        group: None means all.
        places: (shard, offset) of letters; none means all.

    Raises:
        NotFoundError: if a letter of `places` is not there.
    """
    found: dict[str, list[DeadLetter]] = defaultdict(list)
    missing = set(places)
    for delivery in _letters(bus):
        place, body = (delivery.shard, delivery.offset), delivery.message.body()
        missing.discard(place)
        if isinstance(body, DeadLetter) and group in (None, body.group) and (not places or place in places):
            found[body.group].append(body)
    if missing:
        shard, offset = min(missing)
        remedy = "esper bus tail --topic system.dead_letters --from-start"
        raise NotFoundError(f"there is no letter at {shard}:{offset}", field="letter", remedy=remedy)
    return [_requeued(bus, name, letters) for name, letters in sorted(found.items())]


def _letters(bus: Bus) -> Iterator[Delivery]:
    from esper.leyline.messages import Topic

    positions: Mapping[int, int] | None = None
    while True:
        page = bus.read([Topic.DEAD_LETTERS], positions=positions)
        yield from page.deliveries
        if page.is_end:
            return
        positions = page.positions


def _requeued(bus: Bus, group: str, letters: Sequence[DeadLetter]) -> dict[str, Any]:
    try:
        count, said = bus.requeue(letters), ""
    except NotFoundError as error:
        count, said = 0, error.message
    if not said and count < len(letters):
        said = "the others came back before, or are no longer kept"
    return {"group": group, "letters": len(letters), "requeued": count, "note": said}


def event_rows(story: Story) -> list[dict[str, Any]]:
    """One row an event of a run, in order; those that a crash undid are marked."""
    undone = set(map(id, story.undone))
    events = sorted([*story.events, *story.undone], key=lambda event: event.timestamp)
    return [
        {
            "told_at": event.timestamp,
            "epoch": event.epoch,
            "step": event.step,
            "site": event.site,
            "seed": event.seed,
            "stage": f"{event.from_stage.value} > {event.to_stage.value}",
            "blueprint": event.blueprint,
            "state": "undone" if id(event) in undone else "refused" if event.refused else "done",
            "reason": event.reason,
        }
        for event in events
    ]


def messages(
    bus: Bus | StandingBus,
    topics: Sequence[Topic],
    *,
    key: str | None,
    positions: Mapping[int, int] | None,
    from_time: float | None = None,
    follow: bool = False,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of messages, in the order of each shard; what is no message is told as one.

    Args:
        bus: where to look.
        topics: none means all.
        key: None means all.
        positions: see `Bus.read`.
        from_time: see `Bus.read`.
        follow: whether to go on at the end.
        limit: rows, at most.
    """
    num_left = limit
    while True:
        count = 256 if num_left is None else min(256, num_left)
        page = bus.read(topics, key=key, positions=positions, from_time=from_time, max_messages=count)
        rows = [_row(delivery) for delivery in page.deliveries]
        rows += [{"shard": shard, "offset": at, "error": "cannot be decoded"} for shard, at in page.undecodable]
        rows = sorted(rows, key=lambda row: (row["shard"], row["offset"]))[:num_left]
        yield from rows
        num_left = None if num_left is None else num_left - len(rows)
        if num_left == 0 or (page.is_end and not follow):
            return
        positions, from_time = page.positions, None
        if page.is_end:
            time.sleep(POLL_S)


def _row(delivery: Delivery) -> dict[str, Any]:
    return {"shard": delivery.shard, "offset": delivery.offset, **delivery.message.model_dump(mode="json")}


def archived_run(name: str, ids: Sequence[str]) -> str:
    """The run of this name.

    Args:
        name: an id, a unique beginning of one, or `latest`.
        ids: of the runs of an archive, the newest last.

    Raises:
        NotFoundError: if none or more than one fits.
    """
    known = list(dict.fromkeys(reversed(ids)))
    fitting = [name] if name in known else known[:1] if name == "latest" else [i for i in known if i.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise NotFoundError(f"{name!r} could be any of {', '.join(fitting[:5])}", field="run", remedy="give more of it")
    remedy = f"the newest there: {', '.join(known[:5])}" if known else None
    raise NotFoundError(f"the archive tells nothing of the beginning of run {name}", field="run", remedy=remedy)


def _check_shards(bus: Bus | StandingBus, shards: Collection[int]) -> None:
    number = bus.stats().num_shards if shards else 0
    if any(shard >= number for shard in shards):
        raise ConfigError(f"there is no shard {max(shards)}", field="offset", remedy=f"0 to {number - 1}")


def _few(topics: Sequence[str]) -> str:
    return ",".join(topics) if len(topics) <= NUM_NAMED else f"{len(topics)} topics"


def parse_topics(names: Sequence[str]) -> tuple[Topic, ...]:
    """Topics by name.

    Raises:
        ConfigError: if there is no such topic.
    """
    from esper.leyline.messages import Topic

    known = {topic.value: topic for topic in Topic}
    for name in names:
        if name not in known:
            raise ConfigError(f"no topic {name!r}", field="topic", remedy=f"one of {', '.join(known)}")
    return tuple(known[name] for name in names)


def parse_offsets(texts: Sequence[str]) -> dict[int, int]:
    """`SHARD:OFFSET` as numbers.

    Raises:
        ConfigError: if one is not of this form.
    """
    offsets: dict[int, int] = {}
    for text in texts:
        shard, _, offset = text.partition(":")
        if not (shard.isdecimal() and offset.isdecimal()):
            raise ConfigError(f"{text!r} is no SHARD:OFFSET", field="offset", remedy="such as 0:1200")
        offsets[int(shard)] = int(offset)
    return offsets


def line(row: Mapping[str, Any]) -> str:
    """A message as one line of a terminal."""
    where = f"{row['shard']}:{row['offset']}"
    if "error" in row:
        return f"{where:<10} {row['error']}"
    at = dt.datetime.fromtimestamp(row["timestamp"], tz=dt.UTC).strftime("%H:%M:%S.%f")[:-3]
    return f"{where:<10} {at} {row['topic']:<32} {row['key']} {json.dumps(row['payload'])}"
