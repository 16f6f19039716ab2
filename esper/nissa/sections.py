"""The sections below the report's head: pictures, tables, lists. All text that is not ours is escaped here."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Sequence
from itertools import groupby

from esper.leyline.alerts import Alert
from esper.leyline.native import Rung, RungChange
from esper.leyline.signals import LifecycleEvent
from esper.leyline.summary import RunHistory, RunStatus, RunSummary
from esper.nissa import words
from esper.nissa.adaptations import Adaptation
from esper.nissa.charts import Chart
from esper.nissa.outcome import figures
from esper.nissa.stages import LOOKS, css_name

_MAX_ROWS = 400
MAX_ALERTS = 6
"""Rows of alerts that are not folded."""


def section(title: str, drawn: Sequence[Chart], extra: str) -> str:
    if not drawn and not extra:
        return ""
    pictures = "\n".join(_picture(chart) for chart in drawn)
    grid = f'<div class="grid">{pictures}</div>' if drawn else ""
    return f"<section><h2>{html.escape(title)}</h2>{grid}{extra}</section>"


def _picture(chart: Chart) -> str:
    caption = html.escape(chart.caption)
    return f"""<figure class="card{" wide" if chart.wide else ""}">
<h3>{html.escape(chart.title)}</h3><figcaption id="about-{chart.name}">{caption}</figcaption>
<div id="chart-{chart.name}" role="img" aria-label="{html.escape(chart.title)}" aria-describedby="about-{chart.name}"
 style="height:{chart.height}px">
<noscript>This picture needs JavaScript; its figures stand in the tables.</noscript></div>
</figure>"""


def alerts(summary: RunSummary) -> str:
    """What Nissa found out of the ordinary: what, where, since when, the evidence, and what helps to look into it. What
    came again at the same place, and what is too much to be read, is folded.
    """
    if not summary.alerts:
        return ""
    shown: dict[object, Alert] = {}
    for alert in words.gravest_first(summary.alerts):
        shown.setdefault((alert.kind, alert.place), alert)
    first = list(shown.values())[:MAX_ALERTS]
    known = {id(alert) for alert in first}
    others = [alert for alert in words.gravest_first(summary.alerts) if id(alert) not in known]
    folded = f"<details><summary>{len(others)} more</summary>{_alert_table(others)}</details>" if others else ""
    return f"""<section><h2 id="alerts">Out of the ordinary</h2>
<div class="card">{_alert_table(first)}{folded}</div></section>"""


def _alert_table(alerts: Sequence[Alert]) -> str:
    rows = "".join(_alert_row(alert) for alert in alerts)
    return f"""<table class="stack" aria-labelledby="alerts"><thead><tr><th scope="col">What</th>
<th scope="col">Where</th><th scope="col">Since</th><th scope="col">Evidence</th><th scope="col">Look into it</th></tr>
</thead><tbody>{rows}</tbody></table>"""


def _alert_row(alert: Alert) -> str:
    count = "seen once" if alert.count == 1 else f"seen {alert.count:,} times"
    return f"""<tr><th scope="row">{html.escape(alert.summary)}
<span class="kind">{alert.severity.value}: {html.escape(alert.kind.value.replace("_", " "))}</span></th>
<td data-label="Where">{html.escape(alert.place)}</td>
<td data-label="Since">{words.alert_since(alert)}
<span class="muted">to {html.escape(words.alert_until(alert))}</span></td>
<td data-label="Evidence" class="reason">{html.escape(alert.evidence)}
<span class="kind">{count}, {html.escape(alert.detector)}</span></td>
<td data-label="Look into it"><code>{html.escape(alert.command)}</code></td></tr>"""


def adaptations_table(lives: Sequence[Adaptation]) -> str:
    if not lives:
        return '<p class="muted">No adaptation was begun.</p>'
    rows = "".join(_adaptation_row(number, life) for number, life in enumerate(lives, 1))
    return f"""<div class="card" style="margin-top:14px"><h3 id="adaptations">Every adaptation, with its evidence</h3>
<p class="muted" style="margin:0 0 12px;font-size:14px">Gain is the loss without the kernel minus the loss with it, on
paired validation samples taken before the host could lean on the kernel; positive is better.</p>
<table class="stack" aria-labelledby="adaptations"><thead><tr><th scope="col">Site</th><th scope="col">Blueprint</th>
<th scope="col">Epochs</th><th scope="col">Outcome</th><th scope="col">Evidence</th>
<th scope="col">Reason</th></tr></thead>
<tbody>{rows}</tbody></table></div>"""


def _adaptation_row(number: int, life: Adaptation) -> str:
    size = f'<span class="kind">{life.num_parameters:,} parameters</span>' if life.num_parameters is not None else ""
    kernel = f'<span class="kind">kernel {life.kernel_id[:12]}</span>' if life.kernel_id else ""
    native = f'<span class="kind">runs from {words.RUNGS[Rung.NATIVE]}</span>' if life.is_native else ""
    steps = [(event.step, _event(event)) for event in life.events] + [(rung.step, _rung(rung)) for rung in life.rungs]
    path = "".join(item for _, item in sorted(steps, key=lambda step: step[0]))
    last = life.events[-1].epoch + 1
    return f"""<tr><th scope="row">{number}. {html.escape(life.site)}
<span class="kind">{html.escape(life.seed)}</span></th>
<td data-label="Blueprint">{html.escape(life.blueprint or words.UNKNOWN)}{size}{kernel}{native}</td>
<td data-label="Epochs" class="figure">{life.start_epoch + 1} to {last}</td>
<td data-label="Outcome">{_pill(life)}</td>
<td data-label="Evidence">{_evidence(life)}</td>
<td class="reason"><span class="kind">begun because</span>{html.escape(life.motive)}
<span class="kind">{html.escape(life.outcome)} because</span>{html.escape(life.reason)}
<details class="print"><summary>{len(life.events)} transitions</summary>
<ol class="path">{path}</ol></details></td></tr>"""


def _pill(life: Adaptation) -> str:
    return f'<span class="pill"><i class="stage-{css_name(life.stage)}"></i>{html.escape(life.outcome)}</span>'


def _evidence(life: Adaptation) -> str:
    evidence = life.evidence
    if evidence is None:
        return f'{words.UNKNOWN}<span class="kind">none was taken</span>'
    meaning = html.escape(words.KIND_MEANINGS[evidence.kind])
    kind = f'<span class="kind" title="{meaning}">{words.KINDS[evidence.kind]}'
    pairs = f", {evidence.num_pairs} pairs" if evidence.num_pairs else ""
    if evidence.kind not in words.WORTH:
        return f"{html.escape(words.evidence(evidence))}{kind}</span>"
    return f'<span class="figure">{words.gain(evidence)}</span>{kind}{pairs}</span>'


def _event(event: LifecycleEvent) -> str:
    arrow = f"{LOOKS[event.from_stage].word} → {LOOKS[event.to_stage].word}"
    refused = " <b>refused</b>" if event.refused else ""
    evidence = f" · {html.escape(words.evidence(event.evidence))}" if event.evidence is not None else ""
    return (
        f'<li><span class="when">epoch {event.epoch + 1}, step {event.step:,}</span><b>{arrow}</b>{refused}: '
        f'{html.escape(event.reason)}<span class="muted">{evidence}</span></li>'
    )


def _rung(change: RungChange) -> str:
    text = f"<b>runs from its {words.RUNGS[change.rung]}</b>: {html.escape(change.reason)}"
    return f'<li><span class="when">epoch {change.epoch + 1}, step {change.step:,}</span>{text}</li>'


def epochs_table(history: RunHistory) -> str:
    if not history.epochs:
        return ""
    name = next((record.metric_name for record in history.epochs if record.metric_name), None)
    heads = [
        "Epoch",
        "Training loss",
        "Validation loss",
        f"Validation {words.metric_name(name)}",
        "Parameters",
        "Seconds",
    ]
    rows = [
        [
            str(record.epoch + 1),
            words.loss(record.train_loss),
            words.loss(record.val_loss),
            words.metric(name, record.val_metric),
            f"{record.params:,}",
            f"{record.seconds:.2f}",
        ]
        for record in history.epochs[-_MAX_ROWS:]
    ]
    return _details("The figures behind the curves", _table(heads, rows))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" class="number">{html.escape(name)}</th>' for name in heads)
    lines = "".join(
        "<tr>" + "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _details(title: str, body: str) -> str:
    inside = f'<div class="scroll" tabindex="0">{body}</div>'
    return f'<details class="card"><summary>{html.escape(title)}</summary>{inside}</details>'


def decisions(history: RunHistory) -> str:
    """Every decision; the same words in a row are told once."""
    if not history.decisions:
        return ""
    items: list[str] = []
    for reason, group in groupby(history.decisions, key=lambda decision: decision[1]):
        epochs = [epoch + 1 for epoch, _ in group]
        when = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
        items.append(f'<li><span class="when">{when}</span>{html.escape(reason)}</li>')
    return _details(
        "Every decision of the controller, waits too", f'<ol class="path">{"".join(items[-_MAX_ROWS:])}</ol>'
    )


# ---------------------------------------------------------------- foot


def facts(summary: RunSummary) -> str:
    rows = [(name.capitalize() if name.islower() else name, value) for name, value in figures(summary)]
    bus = summary.bus
    rows.append(("Messages", f"{bus.published:,} published, {bus.delivered:,} delivered, {bus.redelivered:,} again"))
    compiler = summary.compiler_in_trainer
    rows.append(
        ("Compiler in the trainer", f"{compiler.dynamo_frames} dynamo frames, {compiler.inductor_compiles} compiles")
    )
    if not summary.went_without:
        rows.append(("Went without", "nothing"))
    if summary.last_checkpoint:
        rows.append(("Last checkpoint", summary.last_checkpoint))
    rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in summary.versions.items())))
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows if value)
    return f'<section><h2>The run in figures</h2><div class="card"><dl class="facts">{items}</dl></div></section>'


def commands(summary: RunSummary) -> str:
    run = html.escape(shlex.quote(summary.run_id))
    resume = (
        f"<h3>Go on where it stopped</h3><pre><code>esper train --resume {run}</code></pre>"
        if summary.status is not RunStatus.FINISHED
        else ""
    )
    return f"""<section><h2>What next</h2><div class="card">{resume}
<h3>Take the network along, for use without Esper</h3><pre><code>esper export {run} --out model.pt2</code></pre>
<h3>See the run again</h3><pre><code>esper runs show {run}</code></pre></div></section>"""


def footer(summary: RunSummary) -> str:
    version = html.escape(summary.versions.get("esper", ""))
    return f"<footer>Written by Esper {version}. This file needs nothing else.</footer>"
