"""The report: complete, self-contained, escaped, and honest about runs that ended otherwise."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import nissa_story as story
import pytest
from plotly.offline import get_plotlyjs

from esper.leyline.alerts import AlertKind
from esper.leyline.errors import StorageError
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Severity
from esper.leyline.summary import CompilerInTrainer, Metrics, Params, Rollback, RunHistory, RunStatus, Start
from esper.nissa import table, write_report
from esper.nissa.adaptations import adaptations
from esper.nissa.charts import Chart, charts
from esper.nissa.live import Live
from esper.nissa.palette import LIGHT, TO_DARK
from esper.nissa.report import render
from esper.nissa.stages import LOOKS

_VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Collects tags, ids and visible text; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text.replace(get_plotlyjs(), ""))  # 4.8 MB of script, slow to look through
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open[-1:] == [tag], f"{tag} closes {self._open[-3:]}"
        self._open.pop()

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))  # of a drawing: it has nothing inside

    def handle_data(self, data):
        if self._open and self._open[-1] not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def whole() -> str:
    return render(story.summary(), story.history())


@pytest.fixture(scope="module")
def drawn() -> dict[str, Chart]:
    return {chart.name: chart for chart in charts(story.summary(), story.history())}


def test_tells_where_the_governor_went_back_and_what_an_upgrade_began_with():
    start = Start(weights="small.safetensors", val_loss=0.61, val_metric=0.772, metric_name="accuracy")
    back = Rollback(epoch=3, step=1204, reason="the weights of <mlp> are out of line")
    summary = story.summary(start=start, rollbacks=(back,))
    history = story.history().model_copy(update={"start": start})
    text = Page(render(summary, history)).text
    for told in (
        "Where the governor went back to the last good state",
        "set back at step 1,204 (epoch 4): the weights of <mlp> are out of line",
        "77.2% before the first step",
        "77.2% validation, loss 0.6100, from small.safetensors",
    ):
        assert told in text, told
    shown = " ".join(table(summary).split())
    assert "set back at step 1,204 (epoch 4)" in shown
    assert "started at 77.2% validation" in shown


def test_alerts_stand_in_the_report_and_in_the_table_with_what_helps():
    grave = story.alert(
        alert_id="a2", kind=AlertKind.DEAD_CHANNELS, site="stages.<1>", severity=Severity.CRITICAL, count=4,
        since=story.STARTED + 20, summary="channels die", evidence="80% of the channels are dead",
        ended_at=story.STARTED + 30, ended_step=90, ending="12% again", command="esper runs report x",
    )  # fmt: skip
    summary = story.summary(alerts=(story.alert(), grave))
    text, shown = Page(render(summary, story.history())).text, " ".join(table(summary).split())
    for told in (
        "channels die", "stages.<1>", "80% of the channels are dead", "step 40", "step 90", "12% again",
        "the loss jumped",
        "3.1 where 0.8 is usual: 12 deviations above", "esper runs report x", f"esper runs show {story.RUN}",
        "the last that was heard of it",
    ):  # fmt: skip
        assert told in text, told
        assert told in shown, told
    assert "seen 4 times" in text
    for words in (text, shown):
        assert words.index("channels die") < words.index("the loss jumped")  # the gravest first
    many = story.summary(alerts=tuple(story.alert(alert_id=str(i)) for i in range(9)))
    assert "and 3 more alerts: esper runs report" in " ".join(table(many).split())
    assert "Out of the ordinary" not in render(story.summary(), story.history())


def test_alerts_that_came_again_are_folded():
    again = [story.alert(alert_id=str(number), evidence=f"time {number}.") for number in range(9)]
    other = story.alert(alert_id="x", kind=AlertKind.DEAD_CHANNELS, site="block", evidence="another")
    page = render(story.summary(alerts=(*again, other)), story.history())
    open_, folded = page[page.index('id="alerts"') :].split("<details><summary>8 more</summary>")
    assert ("time 0." in open_, "another" in open_, "time 1." in open_) == (True, True, False)
    assert "time 8." in folded
    places = [story.alert(alert_id=str(number), site=f"site {number}.") for number in range(9)]
    page = render(story.summary(alerts=tuple(places)), story.history())
    assert "<summary>3 more</summary>" in page
    assert "more</summary>" not in render(story.summary(alerts=(other,)), story.history())


def test_tells_all_that_the_run_came_to(whole):
    text = Page(whole).text
    for told in (
        "A network of 1,434 parameters grew to 2,666",
        "1 fossilized, 1 culled",
        "88.1%",
        "+0.0412 ± 0.0063",
        "paired shadow, 360 pairs",
        story.CULL_REASON,
        "runs from native code",
        story.rungs()[0].reason,
        "Tamiyo for 1 epoch: no answer within 5.0 s",
        "torch 2.13.0",
        f"esper export {story.RUN} --out model.pt2",
        "0 dynamo frames",
    ):
        assert told in text, told
    for event in story.events():
        assert event.to_stage is SeedStage.DORMANT or event.reason in text


def test_opens_offline_and_is_accessible(whole, drawn):
    page = Page(whole)
    loads = [attrs for tag, attrs in page.tags if tag in {"script", "link", "img", "iframe"} and attrs.get("src")]
    assert not loads
    assert [attrs["href"] for tag, attrs in page.tags if tag == "link"] == ["data:,"]
    style = re.findall(r"<style>(.*?)</style>", whole, re.DOTALL)
    assert len(style) == 1
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    pictures = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert all(picture["aria-label"] for picture in pictures)
    charted = [picture for picture in pictures if "aria-describedby" in picture]
    assert len(charted) == len(drawn) == 8
    assert len(pictures) == 8 + 3  # the growth of the live page
    assert all(picture["aria-describedby"] in ids for picture in charted)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert dict(page.tags)["html"] == {"lang": "en"}


def test_the_network_is_drawn_with_the_health_that_was_seen():
    live = Live()
    for message in story.messages():
        live.apply(message)
    known = Page(render(story.summary(), story.history(), live.view(story.RUN))).text
    assert "3 sites, 3 with a measured health, the lowest 0.80" in known
    unknown = Page(render(story.summary(), story.history())).text
    assert "2 sites, none measured" in unknown


def test_markup_in_names_and_reasons_stays_text():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    events = tuple(
        event.model_copy(update={"reason": evil, "site": evil, "blueprint": evil, "seed": evil})
        for event in story.events()
    )
    summary = story.summary(
        run_id=evil, task=evil, events=events, error=evil, status=RunStatus.FAILED, went_without=(evil,),
        last_checkpoint=evil, versions={evil: evil, "esper": evil}, metrics=Metrics(extra={evil: 1.0}),
        alerts=(story.alert(summary=evil, site=evil, evidence=evil, command=evil, ended_at=3e9, ending=evil),),
    )  # fmt: skip
    epochs = tuple(r.model_copy(update={"metric_name": evil}) for r in story.history().epochs)
    history = story.history().model_copy(update={"decisions": ((0, evil),), "epochs": epochs})
    text = render(summary, history)
    assert "<script>alert" not in text.replace(get_plotlyjs(), "")
    assert "<img" not in text.replace(get_plotlyjs(), "")
    assert Page(text).text.count("alert(1)") > 10


def test_every_colour_of_the_charts_has_a_dark_counterpart(drawn):
    colors = set()
    for chart in drawn.values():
        colors |= set(re.findall(r"#[0-9a-fA-F]{6}", json.dumps(chart.figure.to_plotly_json())))
    assert len(colors) > 10
    assert colors <= set(TO_DARK)
    assert len(TO_DARK) == len(LIGHT) + len({look.light for look in LOOKS.values()})


def test_growth_is_marked_where_it_happened_and_by_shape(drawn):
    chart = drawn["metric"]
    marks = {trace.name: trace for trace in chart.figure.data if trace.mode == "markers"}
    assert {name: list(trace.x) for name, trace in marks.items()} == {
        "graft begins": [16.0],
        "fossilized": [22.0],
        "culled": [12.0],
    }
    assert len({trace.marker.symbol for trace in marks.values()}) == 3


def test_the_timeline_covers_every_seed_without_gaps(drawn):
    chart = drawn["timeline"]
    spans: dict[str, list[tuple[float, float]]] = {}
    for trace in chart.figure.data:
        for row, base, length in zip(trace.y, trace.base, trace.x, strict=True):
            spans.setdefault(row, []).append((base, base + length))
    assert set(spans) == {"stages.0", "stages.1"}
    for row in spans.values():
        row.sort()
        assert row[0][0] == 0.0
        assert row[-1][1] == story.EPOCHS
        assert [end for _, end in row[:-1]] == [start for start, _ in row[1:]]


def test_many_steps_are_drawn_as_few_points_that_keep_the_worst():
    times = tuple(5.0 + (40.0 if step == 70_001 else 0.0) for step in range(100_000))
    chart = next(c for c in charts(story.summary(), RunHistory(run_id=story.RUN, step_ms=times)) if c.name == "steps")
    points = chart.figure.data[0]
    assert len(points.x) <= 1_200
    assert max(points.y) == 45.0


@pytest.mark.parametrize("status", list(RunStatus))
def test_a_run_that_did_nothing_yet_has_a_report_too(status):
    summary = story.summary(
        status=status, events=(), field_reports=(), params=Params(start=10, final=10), metrics=Metrics(),
        went_without=(), finished_at=None, error="boom" if status is RunStatus.FAILED else None,
    )  # fmt: skip
    text = Page(render(summary, RunHistory(run_id=story.RUN))).text
    assert "stayed as it was" in text
    assert "No adaptation was begun." in text
    assert ("esper train --resume" in text) is (status is not RunStatus.FINISHED)
    assert ("boom" in text) is (status is RunStatus.FAILED)


def test_a_broken_promise_about_the_compiler_is_not_hidden():
    summary = story.summary(compiler_in_trainer=CompilerInTrainer(dynamo_frames=3))
    assert "A compiler ran in the trainer" in Page(render(summary, RunHistory(run_id=story.RUN))).text


def test_adaptations_begin_at_germination_and_keep_refusals_inside():
    events = list(story.events())
    refused = events[2].model_copy(update={"refused": True, "epoch": 9, "reason": "the gate is shut"})
    before = events[0].model_copy(update={"refused": True, "reason": "no budget"})
    lives = adaptations(story.summary(events=(before, *events[:2], refused, *events[2:])))
    assert [(life.site, life.outcome, len(life.events)) for life in lives] == [
        ("stages.0", "culled", 4),
        ("stages.1", "fossilized", 7),
    ]
    unfinished = adaptations(story.summary(events=story.events()[:2]))
    assert [life.outcome for life in unfinished] == ["unfinished (training)"]


def test_writes_in_one_step_and_says_why_it_could_not(tmp_path):
    path = write_report(story.summary(), RunHistory(run_id=story.RUN), tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(StorageError, match="cannot write the report"):
        write_report(story.summary(), RunHistory(run_id=story.RUN), tmp_path / "missing" / "report.html")
