"""The page of a run in parts, each the HTML of one element by its id: only those that changed are sent again.

All that comes from people, models or configuration is escaped here, in `network` and in `growth`.
"""

# ruff: noqa: E501 (HTML and SVG read best with an element a line)
from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from esper.leyline.alerts import Alert
from esper.leyline.bus import BusStats
from esper.leyline.catalogue import Backlog
from esper.leyline.seeds import ENDED, SeedStage
from esper.leyline.summary import RunStatus
from esper.nissa import growth, network, words
from esper.nissa.viewmodel import LiveView, Note, Tone
from esper.nissa.web.source import Picture, PlatformState

SILENT_S = 120.0
"""A run that has not been heard of for so long may have died."""
_MAX_TOPICS = 40
_MARKS = {Tone.INFO: "", Tone.GOOD: "✓", Tone.WARNING: "!", Tone.BAD: "✕"}
_TONES = {Tone.INFO: "", Tone.GOOD: "good: ", Tone.WARNING: "warning: ", Tone.BAD: "bad: "}

Parts = Mapping[str, str]


def parts_of(
    picture: Picture, platform: PlatformState | None, now: float, before: PlatformState | None = None
) -> Parts:
    """Everything below the page's frame but the list of events.

    Args:
        picture: the run.
        platform: the systems that runs share; None where nobody asks them.
        now: seconds since the epoch.
        before: the platform as it was a while ago, for rates.
    """
    view = picture.view
    return {
        "head": _head(picture),
        "attention": _attention(picture, platform, now),
        "cards": _cards(picture),
        "network": f'<div id="network">{network.picture(view)}</div>',
        "network-told": f'<p id="network-told" class="muted">{html.escape(network.told(view))}</p>',
        "sites": _sites(view),
        "growth": f'<div id="growth">{growth.panels(view, picture.story)}</div>',
        "epochs": f'<div id="epochs" class="scroll" tabindex="0">{growth.epochs_table(view)}</div>',
        "kernels": _kernels(picture, platform),
        "bus": _bus(picture, platform, before),
        "decision": _decision(view),
    }


CHILDREN = {"network": network.cells, "sites": network.rows}
"""Parts of parts: where the same sites are there as before, only those that changed are sent."""


def skeleton(name: str, view: LiveView, text: str) -> str:
    """What tells whether a part must be sent whole: itself, or for one with children what they are."""
    return "\n".join(network.sites_of(view)) if name in CHILDREN else text


# ---------------------------------------------------------------- head


def _head(picture: Picture) -> str:
    view, status = picture.view, picture.status
    start, now = view.params_start, view.params
    title = f"A network of {start:,} parameters"
    if now != start and start:
        title = f"{title} {'grew' if now > start else 'changed'} to <em>{now:,}</em>"
    epochs = f"epoch {min(view.epochs_done + 1, view.num_epochs) if status is RunStatus.RUNNING else view.epochs_done}"
    left = view.seconds_left(view.updated_at) if status is RunStatus.RUNNING else None
    told = [view.task.replace("_", " "), f"{epochs} of {view.num_epochs}", f"{view.step:,} steps"]
    told += [f"about {words.duration(left)} left"] if left else []
    form = "%H:%M:%S" if status is RunStatus.RUNNING else "%Y-%m-%d %H:%M"
    heard = _time(view.updated_at, form) if view.updated_at else "never"
    source = (
        ", as it happens" if picture.is_followed else ", from its folder, which is written at the end of each epoch"
    )
    source = source if status is RunStatus.RUNNING else ""
    return (
        f'<div id="head"><p class="brand"><b>{html.escape(view.run_id)}</b>'
        f'<span class="status {status.value}">{status.value}</span>'
        f"<span>{'last heard of' if status is RunStatus.RUNNING else 'ended'} {heard} UTC{source}</span></p>"
        f'<h1>{title}</h1><p class="lead">{html.escape(", ".join(part for part in told if part))}</p>'
        f'<progress max="1" value="{view.progress:.3f}" aria-label="Share of the run that is done">'
        f"{view.progress:.0%}</progress></div>"
    )


def _cards(picture: Picture) -> str:
    view = picture.view
    last, name = view.last, view.last.metric_name if view.last else None
    cards: list[tuple[str, str, str]] = []
    if last is not None and last.val_metric is not None:
        best = view.best
        told = (
            f"best {words.metric(name, best.val_metric)} at epoch {best.epoch + 1}" if best and best.val_metric else ""
        )
        cards.append((f"Validation {words.metric_name(name)}", words.metric(name, last.val_metric), told))
    if last is not None:
        has_val = last.val_loss is not None
        cards.append(
            (
                "Validation loss" if has_val else "Training loss",
                words.loss(last.val_loss if has_val else last.train_loss),
                f"training {words.loss(last.train_loss)}" if has_val else "",
            )
        )
    elif view.step_losses:
        cards.append(("Training loss", words.loss(view.step_losses[-1]), "of the last steps"))
    grown = f"{words.factor(view.params, view.params_start)} of {view.params_start:,}"
    cards.append(("Parameters", f"{view.params:,}", grown if view.params != view.params_start else "as at the start"))
    stages = [seed.stage for seed in view.seeds.values()]
    fossils = stages.count(SeedStage.FOSSILIZED)
    ended = sum(stage in ENDED for stage in stages)
    cards.append(
        (
            "Kernels kept",
            str(fossils),
            f"{sum(s.is_active for s in stages)} under way" + (f", {ended} ended" if ended else ""),
        )
    )
    if last is not None and last.total_flops:
        cards.append(("FLOPs so far", words.short(last.total_flops), f"{words.short(last.flops_per_sample)} a sample"))
    if view.step_ms is not None:
        cards.append(("Step", words.milliseconds(view.step_ms), "median"))
    items = "".join(
        f"<div><dt>{html.escape(title)}</dt><dd>{html.escape(value)}"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</dd></div>"
        for title, value, note in cards
    )
    return f'<dl id="cards" class="cards">{items}</dl>'


# ---------------------------------------------------------------- what needs attention


def _attention(picture: Picture, platform: PlatformState | None, now: float) -> str:
    found = list(_complaints(picture, platform, now))
    if not found:
        return (
            '<div id="attention"><p class="calm"><span aria-hidden="true">✓</span> Nothing needs attention. Told here: '
            "alerts, failures, rollbacks, silence, systems that are missed, and messages that were dropped or given up.</p></div>"
        )
    items = "".join(f"<li><b>{html.escape(what)}</b> {html.escape(told)}</li>" for what, told in found)
    return f'<div id="attention"><ul class="notice" aria-label="What needs attention">{items}</ul></div>'


def _complaints(picture: Picture, platform: PlatformState | None, now: float) -> Iterable[tuple[str, str]]:
    view, summary = picture.view, picture.summary
    if summary is not None:
        if summary.error:
            yield "The run failed.", summary.error
        if summary.status is RunStatus.INTERRUPTED:
            yield "The run was interrupted.", f"Go on with it: esper train --resume {view.run_id}"
        yield from (("Rolled back:", words.rollback(back)) for back in summary.rollbacks)
        yield from (("Went without", text) for text in summary.went_without)
    yield from (_alert(alert) for alert in view.open_alerts)
    silent_s = now - view.updated_at
    if picture.status is RunStatus.RUNNING and view.updated_at and silent_s > SILENT_S:
        minutes = int(silent_s // 60)
        yield (
            "Silent",
            f"for {minutes} min: it may have been killed. esper train --resume {view.run_id} goes on with it.",
        )
    for name, state in words.circuits(view.last) if picture.status is RunStatus.RUNNING else ():
        instead = "; it decides itself meanwhile" if name == "tamiyo" else ""
        yield (
            f"{name.capitalize()} is not asked",
            f"at present: the trainer's circuit breaker is {state.value.replace('_', ' ')}{instead}.",
        )
    if platform is None:
        return
    yield from (("Missed:", text) for text in platform.missing)
    for group in platform.bus.groups if platform.bus else ():
        if group.dropped:
            yield "Dropped:", f"{group.group} never got {group.dropped:,} messages; newer ones took their place."
        if group.dead:
            yield (
                "Given up:",
                f"{group.dead:,} messages by {group.group}; esper bus tail --topic system.dead_letters --from-start; esper bus requeue",
            )


def _alert(alert: Alert) -> tuple[str, str]:
    since = datetime.fromtimestamp(alert.since, UTC)
    step = f", step {alert.since_step:,}" if alert.since_step is not None else ""
    told = f"{alert.summary}: {alert.evidence}. Look: {alert.command}"
    return f"{alert.place}, since {since:%H:%M:%S}{step}:", told


# ---------------------------------------------------------------- tables


def _sites(view: LiveView) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in network.ROW_HEADS)
    body = "".join(network.rows(view).values())
    return (
        f'<div id="sites" class="scroll" tabindex="0"><table class="figures sites"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _kernels(picture: Picture, platform: PlatformState | None) -> str:
    view = picture.view
    rows = [("Ready for this run's sites", f"{view.kernels_ready:,}"), ("On their way", f"{view.kernels_pending:,}")]
    rows += [(f"Adaptations {outcome.value.replace('_', ' ')}", f"{num:,}") for outcome, num in view.outcomes.items()]
    native = sum(seed.rung is not None and seed.rung.value == "native" for seed in view.seeds.values())
    rows += [("Seeds that run from native code", str(native))] if native else []
    return f'<div id="kernels"><h3>Kernels</h3>{_facts(rows)}<h3>Compile queue</h3>{_queue(platform)}</div>'


def _queue(platform: PlatformState | None) -> str:
    if platform is None:
        return '<p class="muted">Not known from a folder: the page of a running platform shows it.</p>'
    backlog = platform.backlog
    if backlog is None:
        return '<p class="muted">Urza was not asked, or did not answer.</p>'
    devices = sorted({*backlog.queued, *backlog.leased})
    if not devices:
        return '<p class="muted">Empty: nothing waits for a compiler.</p>'
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Device", "Waiting", "With a worker", "Work"))
    body = "".join(_device(backlog, device) for device in devices)
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _device(backlog: Backlog, device: str) -> str:
    work = words.duration(backlog.work_s[device]) if device in backlog.work_s else words.UNKNOWN
    return (
        f'<tr><th scope="row">{html.escape(device)}</th><td>{backlog.queued.get(device, 0):,}</td>'
        f"<td>{backlog.leased.get(device, 0):,}</td><td>{work}</td></tr>"
    )


def _bus(picture: Picture, platform: PlatformState | None, before: PlatformState | None) -> str:
    if platform is not None and platform.bus is not None:
        return f'<div id="bus">{_traffic(platform.bus, _rates(platform, before))}</div>'
    summary = picture.summary
    if platform is None and summary is not None and summary.bus.published:
        counts = summary.bus
        rows = [
            ("Published by this run", f"{counts.published:,}"),
            ("Delivered", f"{counts.delivered:,}"),
            ("Delivered again", f"{counts.redelivered:,}"),
            ("Dropped", f"{counts.dropped:,}"),
            ("Given up", f"{counts.dead:,}"),
        ]
        return f'<div id="bus">{_facts(rows)}<p class="muted">As the summary has it.</p></div>'
    return '<div id="bus"><p class="muted">Not known from a folder: the page of a running platform shows it.</p></div>'


def _rates(platform: PlatformState, before: PlatformState | None) -> Mapping[str, float]:
    if before is None or before.bus is None or platform.bus is None or platform.at <= before.at:
        return {}
    old = {topic.topic: topic.published for topic in before.bus.topics}
    seconds = platform.at - before.at
    return {t.topic: (t.published - old[t.topic]) / seconds for t in platform.bus.topics if t.topic in old}


def _traffic(bus: BusStats, rates: Mapping[str, float]) -> str:
    topics = "".join(
        f'<tr><th scope="row">{html.escape(t.topic)}</th><td>{t.published:,}</td>'
        f"<td>{words.UNKNOWN if t.topic not in rates else f'{rates[t.topic]:.3g}'}</td><td>{words.short(t.kept_bytes)}B</td></tr>"
        for t in bus.topics[:_MAX_TOPICS]
    )
    groups = "".join(
        f'<tr><th scope="row">{html.escape(g.group)}</th><td>{g.pending:,}</td><td>{g.delivered:,}</td>'
        f"<td>{g.redelivered:,}</td><td>{g.dropped:,}</td><td>{g.dead:,}</td></tr>"
        for g in bus.groups[:_MAX_TOPICS]
    )
    topic_heads = "".join(f'<th scope="col">{name}</th>' for name in ("Topic", "Published", "A second", "Kept"))
    names = ("Group", "Lag", "Delivered", "Again", "Dropped", "Given up")
    group_heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        f'<div class="scroll" tabindex="0"><table class="figures"><thead><tr>{topic_heads}</tr></thead><tbody>{topics}</tbody></table></div>'
        f'<div class="scroll" tabindex="0"><table class="figures"><thead><tr>{group_heads}</tr></thead><tbody>{groups}</tbody></table></div>'
    )


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>'


def _decision(view: LiveView) -> str:
    if not view.decision:
        return '<p id="decision" class="muted">The controller has not been asked yet.</p>'
    who = f"tamiyo ({view.policy})" if view.policy else "tamiyo"
    return f'<p id="decision"><b>{html.escape(who)}:</b> {html.escape(view.decision)}</p>'


# ---------------------------------------------------------------- events


def note_item(note: Note) -> str:
    """One event of the list."""
    reason = f'<span class="why">{html.escape(note.reason)}</span>' if note.reason else ""
    return (
        f'<li id="note-{note.number}" class="{note.tone.value}"><span class="mark" aria-hidden="true">{_MARKS[note.tone]}</span>'
        f'<span class="sr">{_TONES[note.tone]}</span><span class="when">epoch {note.epoch + 1}, step {note.step:,}</span> '
        f"<b>{html.escape(note.subject)}</b> {html.escape(note.text)}{reason}</li>"
    )


def _time(at: float, form: str) -> str:
    moment = datetime.fromtimestamp(at, UTC)
    return f'<time datetime="{moment.isoformat(timespec="seconds")}">{moment:{form}}</time>'
