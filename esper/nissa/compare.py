"""Runs side by side: one table of figures for the terminal, JSON and HTML, and the pictures beneath one another."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline.errors import ConfigError, StorageError
from esper.leyline.seeds import SeedStage
from esper.leyline.summary import RunSummary
from esper.nissa import growth, network, words
from esper.nissa.page import MARK, PICTURES, STYLE
from esper.nissa.replay import Told
from esper.nissa.runs import RunStore

MAX_RUNS = len(growth.RUN_STYLES)


@dataclass(frozen=True)
class Compared:
    """One of the runs."""

    summary: RunSummary
    told: Told


def gather(store: RunStore, names: Sequence[str]) -> list[Compared]:
    """Reads the runs, in the order in which they were named.

    Raises:
        ConfigError: if there are fewer than two or too many, or one is named twice.
        NotFoundError: if there is no such run, or more than one.
    """
    ids = [store.resolve(name) for name in names]
    if not 2 <= len(ids) <= MAX_RUNS:
        raise ConfigError(
            f"{len(ids)} runs cannot be compared", field="--compare", remedy=f"name 2 to {MAX_RUNS} of them"
        )
    if len(set(ids)) < len(ids):
        raise ConfigError("a run is named twice", field="--compare", remedy="see esper runs ls")
    return [Compared(store.summary(run), store.told(run)) for run in ids]


def figures(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """The figures of each run as plain values: what `--json` prints. None where a run has no such figure."""
    return [_figures(run) for run in runs]


def _figures(run: Compared) -> dict[str, Any]:
    summary = run.summary
    stages = [event.to_stage for event in summary.events if not event.refused]
    seconds = summary.ledger.seconds.total
    return {
        "run_id": summary.run_id,
        "status": summary.status.value,
        "task": summary.task,
        "seed": summary.seed,
        "policy": run.told.view.policy or None,
        "epochs": run.told.view.epochs_done,
        "val_accuracy": summary.metrics.val_accuracy,
        "test_accuracy": summary.metrics.test_accuracy,
        "val_loss": summary.metrics.val_loss,
        "test_loss": summary.metrics.test_loss,
        **summary.metrics.extra,
        "params_start": summary.params.start,
        "params_final": summary.params.final,
        "flops": summary.ledger.flops.total,
        "flops_shadow": summary.ledger.flops.shadow,
        "seconds": seconds,
        "step_median_ms": summary.steps.median_ms if summary.steps.count else None,
        "kept": stages.count(SeedStage.FOSSILIZED),
        "culled": stages.count(SeedStage.CULLED),
        "rollbacks": len(summary.rollbacks),
    }


def rows(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """(name, one value a run) as people read them; a row that no run has a value for is left out."""
    found = figures(runs)
    names = dict.fromkeys(name for one in found for name in one if name != "run_id")
    return [
        (name.replace("_", " "), [_written(name, one.get(name)) for one in found])
        for name in names
        if any(one.get(name) is not None for one in found)
    ]


def _written(name: str, value: Any) -> str:
    if value is None:
        return words.UNKNOWN
    if words.is_share(name):
        return f"{value:.1%}"
    if name.startswith("flops"):
        return words.short(value)
    if name == "seconds":
        return words.duration(value)
    if name == "step_median_ms":
        return words.milliseconds(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(runs: Sequence[Compared]) -> str:
    """The rows as text for a terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table("", *(run.summary.run_id for run in runs), box=None, pad_edge=False)
    for name, values in rows(runs):
        drawn.add_row(name, *values)
    console = Console(width=60 + 40 * len(runs))
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def render(runs: Sequence[Compared]) -> str:
    """One HTML document that needs nothing else, not even a script."""
    head = "".join(
        f'<th scope="col"><i class="run-{i} swatch"></i>{html.escape(run.summary.run_id)}</th>'
        for i, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f"<td>{html.escape(v)}</td>" for v in values)
        + "</tr>"
        for name, values in rows(runs)
    )
    networks = "".join(
        f'<section class="card"><h3><i class="run-{i} swatch"></i>{html.escape(run.summary.run_id)}</h3>'
        f'<p class="muted">{html.escape(network.told(run.told.view))}</p>{network.picture(run.told.view)}</section>'
        for i, run in enumerate(runs)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{len(runs)} runs side by side · Esper</title>
<link rel="icon" href="data:,">
<style>{STYLE}{PICTURES}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the comparison</a>
<header class="top"><p class="brand">{MARK}<span>Esper</span></p><h1>{len(runs)} runs side by side</h1></header>
<main id="main">
<section aria-labelledby="figures"><h2 id="figures">Figures</h2><div class="card scroll" tabindex="0">
<table class="compared"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div></section>
<section aria-labelledby="growth"><h2 id="growth">Growth</h2><div class="card">
{growth.overlay([run.told.view for run in runs])}</div></section>
<section aria-labelledby="networks"><h2 id="networks">The networks</h2><div class="networks">{networks}</div></section>
</main>
<footer>Written by Esper. This file needs nothing else.</footer>
</body>
</html>
"""


def write(runs: Sequence[Compared], path: Path) -> Path:
    """Writes the comparison; raises `StorageError` if that fails."""
    try:
        path.write_text(render(runs), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the comparison to {path}: {error.strerror}", field="--out") from error
    return path
