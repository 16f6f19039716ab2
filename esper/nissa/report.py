"""`report.html`: one self-contained file that opens offline and tells what a run came to.

All that comes from people, models or configuration is escaped here; charts get it escaped by `charts`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from esper.leyline.errors import StorageError
from esper.leyline.summary import RunHistory, RunStatus, RunSummary
from esper.nissa import growth, network, words
from esper.nissa.adaptations import Adaptation, adaptations
from esper.nissa.charts import charts
from esper.nissa.page import MARK, PICTURES, SCRIPT, STYLE
from esper.nissa.palette import TO_DARK
from esper.nissa.replay import Told, replay
from esper.nissa.sections import adaptations_table, alerts, commands, decisions, epochs_table, facts, footer, section
from esper.nissa.viewmodel import LiveView

_LEARNING = ("metric", "loss")
_SEEDS = ("timeline", "evidence")
_COSTS = ("params", "flops_per_sample", "ledger", "steps")


def write_report(summary: RunSummary, history: RunHistory, path: Path | str, seen: LiveView | None = None) -> Path:
    """Writes the report of a run, finished or not.

    Args:
        summary: what it came to.
        history: the series behind the pictures; may be empty.
        path: the file; its folder must exist. It is replaced in one step, so that nobody reads half of it.
        seen: the last picture that Nissa had of the run: the health of its sites. None: not known, and not drawn.

    Returns:
        The path.

    Raises:
        StorageError: if the file cannot be written.
    """
    path = Path(path).expanduser()
    text = render(summary, history, seen)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write the report to {path}: {error.strerror}") from error
    return path


def render(summary: RunSummary, history: RunHistory, seen: LiveView | None = None) -> str:
    """Returns the report as one HTML document."""
    from plotly.offline import get_plotlyjs

    drawn = {chart.name: chart for chart in charts(summary, history)}
    lives = adaptations(summary)
    specs = {name: chart.figure.to_plotly_json() for name, chart in drawn.items()}
    body = "\n".join(
        part
        for part in (
            _header(summary, history, lives),
            '<main id="main">',
            _notices(summary),
            alerts(summary),
            _grown(replay(summary, history, seen)),
            section("How it learned", [drawn[name] for name in _LEARNING if name in drawn], epochs_table(history)),
            section("How it grew", [drawn[name] for name in _SEEDS if name in drawn], adaptations_table(lives)),
            decisions(history),
            section("What it cost", [drawn[name] for name in _COSTS if name in drawn], ""),
            facts(summary),
            commands(summary),
            "</main>",
            footer(summary),
        )
        if part
    )
    title = html.escape(f"{summary.run_id}: Esper report")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}{PICTURES}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
{body}
<script type="application/json" id="dark-colors">{_json(dict(TO_DARK))}</script>
<script type="application/json" id="charts">{_json(specs)}</script>
<script>{get_plotlyjs() if drawn else ""}</script>
<script>{SCRIPT if drawn else ""}</script>
</body>
</html>
"""


def _grown(told: Told) -> str:
    """The pictures of the live page: the network as it stands, and how it came to that."""
    view = told.view
    if not view.points and not view.seeds:
        return ""
    return f"""<section aria-labelledby="network-title"><h2 id="network-title">The network</h2>
<div class="card"><p class="muted" style="margin:0">{html.escape(network.told(view))}</p>{network.picture(view)}
<details><summary>What the colours and shapes mean</summary>{network.legend()}</details>
<h3 style="margin-top:26px">Growth</h3>{growth.panels(view, told.story)}</div></section>"""


def _json(value: object) -> str:
    """JSON that no string in it can break out of its script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---------------------------------------------------------------- head


def _header(summary: RunSummary, history: RunHistory, lives: Sequence[Adaptation]) -> str:
    started = datetime.fromtimestamp(summary.started_at, UTC)
    cards = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for name, value, note in _cards(summary, history, lives)
    )
    return f"""<header class="top">
<p class="brand">{MARK}<span>Esper</span><b>{html.escape(summary.run_id)}</b>
<span class="status {summary.status.value}">{summary.status.value}</span>
<time datetime="{started.isoformat(timespec="seconds")}">{started:%Y-%m-%d %H:%M} UTC</time></p>
<h1>{_headline(summary)}</h1>
<p class="lead">{html.escape(_lead(summary, history, lives))}</p>
<dl class="cards">{cards}</dl>
</header>"""


def _headline(summary: RunSummary) -> str:
    start, final = summary.params.start, summary.params.final
    if start == final:
        return f"A network of {start:,} parameters stayed as it was"
    verb = "grew" if final > start else "changed"
    return f"A network of {start:,} parameters {verb} to <em>{final:,}</em>"


def _lead(summary: RunSummary, history: RunHistory, lives: Sequence[Adaptation]) -> str:
    ended = {outcome: sum(life.outcome == outcome for life in lives) for outcome in {life.outcome for life in lives}}
    done = len(history.epochs)
    epochs = f"{done} epochs" if done == summary.num_epochs else f"{done} of {summary.num_epochs} epochs"
    text = f"{summary.task.replace('_', ' ').capitalize()}, {epochs}, seed {summary.seed}"
    text += ", deterministic. " if summary.deterministic else ". "
    if not lives:
        return text + "No adaptation was begun."
    noun = "adaptation" if len(lives) == 1 else "adaptations"
    listed = ", ".join(
        f"{number} {outcome}"
        for outcome, number in sorted(ended.items(), key=lambda item: (item[0] != "fossilized", item[0]))
    )
    return f"{text}{len(lives)} {noun}: {listed}."


def _cards(summary: RunSummary, history: RunHistory, lives: Sequence[Adaptation]) -> list[tuple[str, str, str]]:
    metrics, params = summary.metrics, summary.params
    cards: list[tuple[str, str, str]] = []
    if metrics.test_accuracy is not None:
        cards.append(("Test accuracy", f"{metrics.test_accuracy:.1%}", "untouched by any gate"))
    if metrics.val_accuracy is not None:
        cards.append(("Validation accuracy", f"{metrics.val_accuracy:.1%}", _from_first(history)))
    if metrics.val_loss is not None:
        note = f"test {words.loss(metrics.test_loss)}" if metrics.test_loss is not None else ""
        cards.append(("Validation loss", words.loss(metrics.val_loss), note))
    cards += [(words.metric_name(k).capitalize(), words.metric(k, v), "") for k, v in metrics.extra.items()]
    grown = words.factor(params.final, params.start) if params.final != params.start else "unchanged"
    cards.append(("Parameters", f"{params.final:,}", f"{grown} of {params.start:,}" if params.start else ""))
    if lives:
        kept = sum(life.outcome == "fossilized" for life in lives)
        cards.append(("Adaptations kept", f"{kept} of {len(lives)}", ""))
    flops = summary.ledger.flops
    if flops.total:
        share = (flops.shadow + flops.trials) / flops.total
        cards.append(("FLOPs in all", words.short(flops.total), f"{share:.0%} for trials of kernels"))
    if summary.finished_at is not None:
        cards.append(("Time", words.duration(summary.finished_at - summary.started_at), ""))
    return cards


def _from_first(history: RunHistory) -> str:
    if history.start is not None and history.start.val_metric is not None:
        return f"{history.start.val_metric:.1%} before the first step"
    first = next((r.val_metric for r in history.epochs if r.val_metric is not None), None)
    return f"{first:.1%} after the first epoch" if first is not None else ""


def _notices(summary: RunSummary) -> str:
    parts: list[str] = []
    if summary.error:
        parts.append(f'<div class="notice bad" role="note"><b>The run failed.</b> {html.escape(summary.error)}</div>')
    if summary.status is RunStatus.INTERRUPTED:
        parts.append(
            '<div class="notice" role="note"><b>The run was interrupted.</b> It can be resumed; see below.</div>'
        )
    if summary.rollbacks:
        items = "".join(f"<li>{html.escape(words.rollback(back))}</li>" for back in summary.rollbacks)
        parts.append(
            '<div class="notice" role="note"><b>Where the governor went back to the last good state</b> '
            f"<ul>{items}</ul></div>"
        )
    if summary.went_without:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in summary.went_without)
        parts.append(f'<div class="notice" role="note"><b>What the run went without</b><ul>{items}</ul></div>')
    compiler = summary.compiler_in_trainer
    if compiler.dynamo_frames or compiler.inductor_compiles:
        parts.append(
            '<div class="notice bad" role="note"><b>A compiler ran in the trainer:</b> '
            f"{compiler.dynamo_frames} dynamo frames, {compiler.inductor_compiles} inductor compiles.</div>"
        )
    return "\n".join(parts)
