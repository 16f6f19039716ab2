"""Where the commands find Urza: on a running platform, or, where no Ray is joined, at the storage address itself.

`RAY_ADDRESS` decides. Reading an address takes nothing over and disturbs nobody, whoever serves it. Writing to it makes
this process its Urza for a moment: that is refused while another is known to serve it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from esper.leyline.errors import ConflictError, NotFoundError, UnavailableError, UserError
from esper.storage import Storage

if TYPE_CHECKING:
    from actors.urza import UrzaHandle
    from esper.urza.hub import Hub
    from esper.urza.submission import Queries

BEGINNING = 4
"""Characters of an id that must be given, at least."""


class NoPlatformError(NotFoundError, UserError):
    """Nothing to ask: no cluster, or no platform for this storage on it."""


class NothingThereError(NotFoundError, UserError):
    """No catalogue, or nothing, or more than one thing, goes by this name."""


class ServedElsewhereError(ConflictError, UserError):
    """Another process writes this storage."""


def is_joined() -> bool:
    """Whether the commands speak with a cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def reading(storage: str) -> Iterator[Queries]:
    """The catalogue of a storage: asked of its Urza on the joined cluster, or read from the address.

    Raises:
        NoPlatformError: if a cluster is joined that has no Urza for it.
        NothingThereError: if no catalogue lies there.
    """
    if is_joined():
        with on_platform(storage) as hub:
            yield hub
        return
    from esper.urza.reading import Reader

    try:
        reader = Reader.of(Storage.at(storage))
    except NotFoundError as error:
        raise NothingThereError(
            error.message, field="storage", remedy="esper train makes one; or name another --storage"
        ) from error
    yield reader


@contextlib.contextmanager
def on_platform(storage: str) -> Iterator[UrzaHandle]:
    """The Urza that serves a storage on the cluster at `RAY_ADDRESS`.

    Raises:
        NoPlatformError: if there is none.
    """
    from actors.cluster import connected

    place = Storage.at(storage)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(connected())
        except UnavailableError as error:
            raise NoPlatformError(error.message, remedy=error.remedy) from error
        from actors import urza  # imports Ray, whose settings come first

        try:
            hub = urza.connect(storage)
        except UnavailableError as error:
            raise NoPlatformError(
                f"no platform is up for {place.shown} on {os.environ['RAY_ADDRESS']}",
                field="storage",
                remedy="esper platform up; or unset RAY_ADDRESS to use the storage without one",
            ) from error
        yield hub


@contextlib.contextmanager
def own_hub(storage: str, *, take_over: bool) -> Iterator[Hub]:
    """Makes this process the Urza of a storage that no other serves; writes the tables for other readers at the end.

    Args:
        storage: the address.
        take_over: whether to do so though it was last served from another machine, which cannot be seen from here.

    Raises:
        ServedElsewhereError: if another process serves it, or may do so.
        StorageError: if a run of this machine holds the directory, or it cannot be written.
    """
    from actors.launch import held
    from esper.urza.events import last_writer
    from esper.urza.hub import Hub

    place = Storage.at(storage)
    with held(place, shared=False):
        writer = last_writer(place)
        if writer is not None and not take_over:
            _check_ended(writer, place)
        hub = Hub.open(place)
        yield hub
        hub.write_uses()
        hub.project(place)


def writing(storage: str, *, take_over: bool) -> contextlib.AbstractContextManager[UrzaHandle | Hub]:
    """The Urza that serves a storage on the joined cluster, or this process as its Urza; see those two for the rest."""
    return on_platform(storage) if is_joined() else own_hub(storage, take_over=take_over)


def _check_ended(writer: str, place: Storage) -> None:
    host, pid, _ = writer.rsplit(":", 2)
    if host != socket.gethostname():
        raise ServedElsewhereError(
            f"{place.shown} was last served from {host}: a platform that is up there would lose it for good",
            field="storage",
            remedy="join that cluster (RAY_ADDRESS), or give --take-over if nothing is up there",
        )
    if _is_urza(int(pid)):
        raise ServedElsewhereError(
            f"{place.shown} is served by process {pid} of this machine",
            field="storage",
            remedy="join its cluster (RAY_ADDRESS=auto), wait for its run, or esper platform down",
        )


def _is_urza(pid: int) -> bool:
    """Whether a process of this number lives and may be an Urza: an actor's process is called after its class."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return b"Urza" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


# ---------------------------------------------------------------- names


def find_blueprint(hub: Queries, name: str) -> str:
    """The id of a blueprint by its id, a unique beginning of it, or its name (then its last version).

    Raises:
        NothingThereError: if nothing, or more than one thing, goes by it.
    """
    from esper.leyline.catalogue import BlueprintOrder, BlueprintQuery

    query = BlueprintQuery(name=name, order=BlueprintOrder.NAME, descending=True, limit=1)
    if named := hub.search_blueprints(query).blueprints:
        return named[0].blueprint_id
    return _only(hub.ids(name).blueprints if len(name) >= BEGINNING else (), name, "blueprint", "blueprints")


def find_kernel(hub: Queries, name: str) -> str:
    """The id of a kernel by its id or a unique beginning of it.

    Raises:
        NothingThereError: if nothing, or more than one thing, goes by it.
    """
    return _only(hub.ids(name).kernels if len(name) >= BEGINNING else (), name, "kernel", "kernels")


def _only(found: tuple[str, ...], name: str, what: str, command: str) -> str:
    if name in found:
        return name
    if len(found) == 1:
        return found[0]
    if not found:
        raise NothingThereError(f"no {what} {name!r}", field=what, remedy=f"see esper {command} ls")
    raise NothingThereError(
        f"{name!r} could be any of {', '.join(one[:16] for one in found)}", field=what, remedy="give more of it"
    )
