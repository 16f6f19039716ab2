"""The network as a picture: its sites along the path from input to output, and on each what grows there.

Each site is a small drawing of its own (`cells`), so that a page that follows a run exchanges only those that changed.
A colour never stands alone: health is also an arc's length and a figure, a stage also a height, a shape and a word.
Sites stand in the order in which the host names them; branches between them are not known here, and not drawn.
"""

# ruff: noqa: E501 (HTML and SVG read best with an element a line)
from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from esper.leyline.seeds import ENDED, SeedStage
from esper.nissa import words
from esper.nissa.stages import LOOKS, TRACK, css_name, word
from esper.nissa.viewmodel import LiveView, SeedView

DENSE = 24
"""From so many sites on they are drawn small."""
_LABEL = 22
_MAX_STEMS = 5
_GROUND, _TOP = 78.0, 16.0
_HEALTHY, _POOR = 0.66, 0.33


def picture(view: LiveView) -> str:
    """The whole picture as HTML: a list of sites from input to output."""
    if not view.sites and not view.seeds:
        return '<p class="muted">No site of this run has been heard of yet.</p>'
    inside = "".join(cells(view).values())
    dense = " dense" if len(sites_of(view)) > DENSE else ""
    return (
        f'<ol class="network{dense}" aria-label="The network, from input to output">'
        f'<li class="end" aria-hidden="true"><span>input</span></li>{inside}'
        '<li class="end" aria-hidden="true"><span>output</span></li></ol>'
    )


def cells(view: LiveView) -> Mapping[str, str]:
    """Each site's drawing by its element's id, in the order of the host."""
    by_site = sites_of(view)
    return {f"site-{i}": _cell(f"site-{i}", view, site, seeds) for i, (site, seeds) in enumerate(by_site.items())}


def rows(view: LiveView) -> Mapping[str, str]:
    """The same as rows of a table, by element id: for those who cannot see the picture, and for its figures."""
    by_site = sites_of(view)
    return {f"row-{i}": _row(f"row-{i}", view, site, seeds) for i, (site, seeds) in enumerate(by_site.items())}


ROW_HEADS = ("Site", "Shape", "Health", "Growth potential", "What grows there")


def sites_of(view: LiveView) -> Mapping[str, Sequence[SeedView]]:
    """Every site with its seeds, the one last heard of at the end."""
    found: dict[str, list[SeedView]] = {site: [] for site in view.sites}
    for seed in view.seeds.values():
        found.setdefault(seed.site, []).append(seed)
    for seeds in found.values():
        seeds.sort(key=lambda seed: (max(seed.health_step, seed.stage_step), seed.seed_id))
    return found


def legend() -> str:
    """What the colours and shapes mean."""
    stages = "".join(
        f'<li><i class="dot s-{css_name(stage)}"></i><b>{look.word}</b> {look.meaning}</li>'
        for stage, look in LOOKS.items()
    )
    health = (
        '<li><i class="dot h-good"></i><b>healthy</b> from 0.66</li><li><i class="dot h-fair"></i><b>fair</b></li>'
        '<li><i class="dot h-poor"></i><b>poor</b> below 0.33: carries little</li>'
        '<li><i class="dot h-none"></i><b>not measured</b></li>'
    )
    return (
        f'<div class="legend"><ul aria-label="Health of sites">{health}</ul><ul aria-label="Stages">{stages}</ul></div>'
    )


def told(view: LiveView) -> str:
    """The picture in a sentence."""
    by_site = sites_of(view)
    scores = [score for seeds in by_site.values() if (score := health_of(seeds)) is not None]
    growing = [seed for seeds in by_site.values() for seed in seeds if seed.stage.is_active]
    fossils = sum(seed.stage is SeedStage.FOSSILIZED for seeds in by_site.values() for seed in seeds)
    parts = [_count(len(by_site), "site")]
    parts.append(f"{len(scores)} with a measured health, the lowest {min(scores):.2f}" if scores else "none measured")
    parts.append(f"{_count(len(growing), 'seed')} under way" if growing else "no seed under way")
    parts.append(f"{_count(fossils, 'kernel')} kept")
    return ", ".join(parts) + "."


def health_of(seeds: Sequence[SeedView]) -> float | None:
    """The site's health as last reported; None where nobody measured it."""
    return next((seed.health_score for seed in reversed(seeds) if seed.health_score is not None), None)


# ---------------------------------------------------------------- one site


def _cell(identifier: str, view: LiveView, site: str, seeds: Sequence[SeedView]) -> str:
    score, shown = health_of(seeds), _shown(seeds)
    drawn = "".join(_stem(seed, i, len(shown)) for i, seed in enumerate(shown))
    name = html.escape(site)
    current = seeds[-1] if seeds else None
    stage = word(current.stage) if current else "no seed yet"
    css = f"s-{css_name(current.stage)}" if current else ""
    lit = " active" if current is not None and current.stage.is_active else ""
    what = html.escape(" + ".join(grown for seed in shown if seed.stage in TRACK and (grown := _what(seed))))
    return (
        f'<li id="{identifier}" class="site{lit}"><svg viewBox="0 0 84 100" aria-hidden="true" focusable="false">'
        f'<path class="wire" d="M0 {_GROUND:g}H84"/>{drawn}{_node(score)}</svg>'
        f'<b title="{name}">{html.escape(_cut(site)).replace(".", ".<wbr>")}</b><span class="stage {css}">{stage}</span><small>{what}</small>'
        f'<span class="health">{_health_words(score)}</span><span class="dims">{html.escape(shape(view, site))}</span></li>'
    )


def _node(score: float | None) -> str:
    centre = f'cx="42" cy="{_GROUND:g}" r="10"'
    if score is None:
        return f'<circle class="node h-none" {centre}/>'
    return (
        f'<circle class="node" {centre}/><circle class="arc {_health_class(score)}" {centre} pathLength="100" '
        f'stroke-dasharray="{100 * score:.0f} 100" transform="rotate(-90 42 {_GROUND:g})"/>'
        f'<text x="42" y="{_GROUND + 3.4:g}">{100 * score:.0f}</text>'
    )


def _health_class(score: float) -> str:
    return "h-good" if score >= _HEALTHY else "h-fair" if score >= _POOR else "h-poor"


def _health_words(score: float | None) -> str:
    return "health not measured" if score is None else f"health {score:.2f}"


def _shown(seeds: Sequence[SeedView]) -> Sequence[SeedView]:
    """Fossils stay to be seen; of the others those that live, and the last one that ended."""
    kept = [s for s in seeds if s.stage is SeedStage.FOSSILIZED or s.stage.is_active]
    if seeds and seeds[-1].stage in ENDED and seeds[-1] not in kept:
        kept.append(seeds[-1])
    return kept[-_MAX_STEMS:]


def _stem(seed: SeedView, place: int, num: int) -> str:
    """One stem: as high as the seed has come, leaves by pairs, and on top a shape that says how it stands."""
    x = 42 + (place - (num - 1) / 2) * min(17.0, 68 / max(num, 1))
    css = f"s-{css_name(seed.stage)}"
    if seed.stage not in TRACK:
        y = _GROUND - 26
        return (
            f'<g class="plant {css}"><path class="stem dead" d="M42 {_GROUND - 10:g}C42 {y + 8:g} {x:.1f} {y + 10:g} {x:.1f} {y:g}"/>'
            f'<path class="cross" d="M{x - 4:.1f} {y - 4:g}l8 8m0 -8l-8 8"/></g>'
        )
    reached = (TRACK.index(seed.stage) + 1) / len(TRACK)
    y = _GROUND - 14 - (_GROUND - 14 - _TOP) * reached
    stem = f'<path class="stem" d="M42 {_GROUND - 10:g}C42 {(y + _GROUND) / 2:.1f} {x:.1f} {(y + _GROUND) / 2:.1f} {x:.1f} {y:.1f}"/>'
    pairs = max(round(reached * 3), 1)
    leaves = "".join(
        _leaf(x, y + 6 + 11 * k, right=k % 2 == 0) + _leaf(x, y + 9 + 11 * k, right=k % 2 == 1) for k in range(pairs)
    )
    top = (
        f'<path class="tip" d="M{x:.1f} {y - 7:.1f}l5 6l-5 6l-5 -6z"/>'
        if seed.stage is SeedStage.FOSSILIZED
        else f'<circle class="tip" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    )
    return f'<g class="plant {css}">{stem}{leaves}{top}</g>'


def _leaf(x: float, y: float, *, right: bool) -> str:
    side = 1 if right else -1
    return f'<path class="leaf" d="M{x:.1f} {y:.1f}c{2 * side} -6 {8 * side} -7 {12 * side} -6c{-1 * side} 5 {-6 * side} 8 {-12 * side} 6z"/>'


def _what(seed: SeedView | None) -> str:
    if seed is None or seed.stage is SeedStage.DORMANT:
        return ""
    parts = [seed.blueprint] if seed.blueprint else []
    if seed.stage is SeedStage.GRAFTING:
        parts.append(f"{seed.alpha:.0%} blended")
    return ", ".join(parts)


def _row(identifier: str, view: LiveView, site: str, seeds: Sequence[SeedView]) -> str:
    score = health_of(seeds)
    potential = next((seed.grow_potential for seed in reversed(seeds) if seed.grow_potential is not None), None)
    grown = "; ".join(
        html.escape(
            " ".join(
                part
                for part in (word(seed.stage), _what(seed), words.evidence(seed.evidence) if seed.evidence else "")
                if part
            )
        )
        for seed in seeds
        if seed.seed_id
    )
    return (
        f'<tr id="{identifier}"><th scope="row">{html.escape(site)}</th><td>{html.escape(shape(view, site)) or words.UNKNOWN}</td>'
        f"<td>{words.UNKNOWN if score is None else f'{score:.2f}'}</td>"
        f"<td>{words.UNKNOWN if potential is None else f'{potential:.3g}'}</td><td>{grown or 'nothing yet'}</td></tr>"
    )


def shape(view: LiveView, site: str) -> str:
    """`feature map 4x8x8` with signs of multiplication; empty where it is not known."""
    kind, _, rest = view.sites.get(site, "").partition("-")
    return f"{kind.replace('_', ' ')} {rest.partition('-')[0].replace('x', chr(215))}".strip()


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}" + ("" if num == 1 else "s")


def _cut(text: str) -> str:
    return text if len(text) <= _LABEL else "…" + text[-_LABEL + 1 :]
