"""`esper ui`: the live page of a storage, without Ray.

A run that goes on is shown from what it writes at the end of each epoch.
"""

from __future__ import annotations

import json
import threading
from typing import Annotated

import typer

from jobs.options import DEFAULT_STORAGE, Json, Storage


def ui(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Lead to this run; `latest`, or part of its id.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; anything but loopback asks for the token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The first port that is tried; 0: any.")] = 8420,
    always_token: Annotated[bool, typer.Option("--always-token", help="Ask for the token on loopback too.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Show runs in a browser, finished and running alike."""
    from esper.config import PageConfig
    from esper.nissa.runs import RunStore
    from esper.nissa.web import FolderRuns, PageServer, build_app
    from esper.urza.guard import limits_of

    store = RunStore(storage)
    leads_to = f"/runs/{store.resolve(run)}" if run is not None else "/"
    config = PageConfig(host=host, port=port, always_token=always_token)
    limits = limits_of(config)
    ending = threading.Event()

    def make_app() -> object:
        shown, where = FolderRuns(store), store.storage.shown
        return build_app(shown, where=where, token_digest=limits.token_digest, hosts=limits.hosts, ending=ending)

    server = PageServer(make_app, host=host, port=port, ending=ending)
    try:
        address = server.address + leads_to
        if as_json:
            typer.echo(json.dumps({"address": address, "storage": store.storage.shown}))
        else:
            token = f"; it asks for the token in {config.token_file}" if limits.token_digest else ""
            typer.echo(f"{address}{token}\nCtrl-C ends it")
        server.wait()
    except KeyboardInterrupt:
        if not as_json:
            typer.echo("ended")
    finally:
        server.close()
