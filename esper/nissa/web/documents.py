"""The page's documents: the frame of a run, the list of runs, the door. What is inside a run is in `parts`."""

# ruff: noqa: E501 (HTML and SVG read best with an element a line)
from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from esper.leyline.summary import RunStatus
from esper.nissa import network
from esper.nissa.page import MARK
from esper.nissa.viewmodel import Note
from esper.nissa.web.parts import Parts, note_item

SECTIONS = (
    ("network-title", "The network"),
    ("growth-title", "Growth"),
    ("events-title", "Events"),
    ("kernels-title", "Kernels and compile queue"),
    ("bus-title", "Bus"),
)


def run_page(run_id: str, parts: Parts, notes: Sequence[Note], *, num_earlier: int, last_id: str) -> str:
    """A run's page, whole without a script; with one it goes on from `last_id`."""
    here = quote(run_id)
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in SECTIONS)
    items = "".join(note_item(note) for note in reversed(notes))
    body = f"""<header class="top">
<p class="brand"><a href="/">{MARK}<span>Esper</span></a>
<span id="link" class="link" role="status" data-state="still">not live: this needs JavaScript</span></p>
<div id="over" class="notice" role="status" hidden></div>
{parts["head"]}
{parts["attention"]}
{parts["cards"]}
<nav aria-label="Sections"><ul class="sections">{links}</ul></nav>
</header>
<main id="main">
<section aria-labelledby="network-title"><h2 id="network-title">The network</h2>
<div class="card">{parts["network-told"]}{parts["network"]}
<details><summary>What the colours and shapes mean</summary>{network.legend()}</details>
<details><summary>The sites as a table</summary>{parts["sites"]}</details>
<p class="muted small">Sites stand in the order in which the host names them; branches between them are not drawn.</p>
</div></section>
<section aria-labelledby="growth-title"><h2 id="growth-title">Growth</h2>
<div class="card">{parts["growth"]}
<details><summary>The figures behind the curves</summary>{parts["epochs"]}</details></div></section>
<section aria-labelledby="events-title"><h2 id="events-title">Events</h2>
<div class="card">{parts["decision"]}
<p class="filter"><label for="filter">Show</label> <select id="filter"><option value="">everything</option>
<option value="good">kept</option><option value="warning">warnings</option><option value="bad">rollbacks</option></select></p>
<ol id="notes" class="notes" aria-label="What happened, latest first" data-first="{notes[0].number if notes else 0}">{items}</ol>
<p><button id="earlier" type="button"{"" if num_earlier else " hidden"}>Show earlier events</button></p>
</div></section>
<div class="pair">
<section aria-labelledby="kernels-title"><h2 id="kernels-title">Kernels and compile queue</h2>
<div class="card">{parts["kernels"]}</div></section>
<section aria-labelledby="bus-title"><h2 id="bus-title">Bus</h2><div class="card">{parts["bus"]}</div></section>
</div>
</main>
<p id="news" class="sr" role="log" aria-live="polite"></p>
<footer>Esper serves this page itself; it loads nothing from anywhere else.</footer>"""  # noqa: S608 - HTML
    data = f'data-stream="/runs/{here}/stream?after={quote(last_id)}" data-notes="/runs/{here}/notes"'
    return document(run_id, body, data)


def over(run_id: str, status: RunStatus | None, where: str) -> Mapping[str, str]:
    """What a run's page is told when its server ends: `told` in the place of the line's state, `html` as a notice.

    Args:
        run_id: of the run.
        status: of the run; None where it cannot be known any more.
        where: the storage address.
    """
    run, storage = html.escape(shlex.quote(run_id)), html.escape(shlex.quote(where))
    again = f"To see it again: <code>esper ui {run} --storage {storage}</code>"
    if status is None or status is RunStatus.RUNNING:
        unless = "and the run had not" if status else "and whether the run has is not known"
        what = f"<b>What served this page has ended, {unless}.</b> This is the last that was heard of it."
        return {"told": "ended: this is the last picture", "html": f"{what} {again}"}
    what = f"<b>The run is over ({status.value}), and the Ray that served this page has ended with it.</b>"
    kept = "This is its last picture; it stays for as long as this tab is open."
    told = f"the run is over ({status.value}): this is its last picture"
    report = f"<code>esper runs report {run} --storage {storage}</code>"
    return {"told": told, "html": f"{what} {kept} {again}; its report: {report}"}


def closed(where: str) -> Mapping[str, str]:
    """The same for the list of runs."""
    storage = html.escape(shlex.quote(where))
    what = "<b>What served this page has ended.</b> This is its last list."
    return {
        "told": "ended: this is the last list",
        "html": f"{what} To see it again: <code>esper ui --storage {storage}</code>",
    }


def runs_page(table: str) -> str:
    """The list of runs."""
    body = f"""<header class="top"><p class="brand">{MARK}<span>Esper</span>
<span id="link" class="link" role="status" data-state="still">not live: this needs JavaScript</span></p>
<div id="over" class="notice" role="status" hidden></div>
<h1>Runs</h1></header>
<main id="main"><section aria-label="Runs"><div class="card">{table}</div></section></main>
<footer>Esper serves this page itself; it loads nothing from anywhere else.</footer>"""
    return document("Runs", body, 'data-stream="/stream"')


def runs_table(rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """The runs with what they came to, as one part."""
    if not rows:
        words = f"No runs under {html.escape(where)} yet. Start one: <code>esper train configs/digits.yaml</code>"
        return f'<div id="runs"><p class="muted">{words}</p></div>'
    heads = ("Run", "Status", "Started (UTC)", "Validation", "Test", "Parameters", "Kept")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div id="runs"><table class="figures stack"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(_run_row(row) for row in rows)}</tbody></table></div>"
    )


def _run_row(row: Mapping[str, Any]) -> str:
    run = html.escape(row["run_id"])
    status = html.escape(row["status"])
    if "task" not in row:
        return f'<tr><th scope="row">{run}</th><td data-label="Status" colspan="6">{status}</td></tr>'
    accuracy, loss, test = row["val_accuracy"], row["val_loss"], row["test_accuracy"]
    value = f"{accuracy:.1%}" if accuracy is not None else "—" if loss is None else f"loss {loss:.4g}"
    size = f"{row['params_start']:,} → {row['params_final']:,}"
    return (
        f'<tr><th scope="row"><a href="/runs/{quote(row["run_id"])}">{run}</a></th>'
        f'<td data-label="Status"><span class="status {status}">{status}</span></td>'
        f'<td data-label="Started">{html.escape(row["started"][:16])}</td><td data-label="Validation">{value}</td>'
        f'<td data-label="Test">{"—" if test is None else f"{test:.1%}"}</td>'
        f'<td data-label="Parameters">{size}</td><td data-label="Kept">{row["fossils"]}</td></tr>'
    )


def problem_page(title: str, told: str) -> str:
    """What is said where there is no page."""
    body = f"""<header class="top"><p class="brand"><a href="/">{MARK}<span>Esper</span></a></p>
<h1>{html.escape(title)}</h1></header><main id="main"><p>{html.escape(told)}</p><p><a href="/">All runs</a></p></main>"""
    return document(title, body, "")


def door_page(*, was_wrong: bool) -> str:
    """Asks for the token."""
    wrong = '<p class="notice bad" role="alert">That is not the token.</p>' if was_wrong else ""
    body = f"""<header class="top"><p class="brand">{MARK}<span>Esper</span></p><h1>This page asks for a token</h1></header>
<main id="main">{wrong}<form method="post" action="/login" class="card"><p><label for="token">It lies in the file that
<code>nissa.page.token_file</code> names, on the machine that serves this page.</label></p>
<p><input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Let me in</button></p></form></main>"""
    return document("Token", body, "", is_inside=False)


def document(title: str, body: str, data: str, *, is_inside: bool = True) -> str:
    """An HTML document; outside the door it has neither style nor script, which lie inside."""
    inside = (
        '<link rel="stylesheet" href="/assets/page.css">\n<script type="module" src="/assets/live.js"></script>'
        if is_inside
        else ""
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)} · Esper</title>
<link rel="icon" href="data:,">
{inside}
</head>
<body {data}>
<a class="skip" href="#main">Skip to the content</a>
{body}
</body>
</html>
"""
