"""The live page: what it shows, whom it lets in, and what it streams to whom."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import nissa_story as story
import pytest
from starlette.testclient import TestClient

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.bus import BusStats, GroupStats, TopicStats
from esper.leyline.catalogue import Backlog
from esper.leyline.errors import StorageError, UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import LifecycleEvent
from esper.leyline.summary import RunStatus
from esper.nissa import growth, network
from esper.nissa.live import MAX_STORY, Live
from esper.nissa.replay import dump, load, replay
from esper.nissa.runs import RunStore
from esper.nissa.viewmodel import NUM_POINTS, LiveView, Note, Tone
from esper.nissa.web import FolderRuns, LiveRuns, Picture, PlatformState, build_app, source
from esper.nissa.web.feed import NUM_NOTES, RunFeed
from esper.nissa.web.parts import SILENT_S, parts_of

NOW = story.STARTED + 95.0
TOKEN = "a" * 64


def followed(last_epoch: int = story.EPOCHS - 1) -> Live:
    live = Live()
    for message in story.messages(last_epoch):
        live.apply(message)
    return live


def lay_down(root, *, seen=True, **changes):
    folder = root / "runs" / story.RUN
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(story.summary(**changes).model_dump_json())
    (folder / "history.json").write_text(story.history().model_dump_json())
    (folder / "config.yaml").write_text("seed: 7\n")
    if seen:
        (folder / "view.json").write_bytes(dump(followed().view(story.RUN)))
    return folder


@pytest.fixture
def folder_runs(tmp_path):
    lay_down(tmp_path)
    return FolderRuns(RunStore(str(tmp_path)))


@pytest.fixture
def client(folder_runs):
    return TestClient(build_app(folder_runs, where="here"), base_url="http://127.0.0.1")


class Told:
    """Runs of a `Live`, as the page of a platform has them."""

    def __init__(self, live: Live) -> None:
        self.live, self.state = live, None
        self._known: dict[LiveView, Picture] = {}

    def rows(self):
        return []

    def picture(self, run_id):
        view = self.live.view(run_id)
        if id(view) not in self._known:
            self._known = {id(view): Picture(view, None, self.live.story(run_id), is_followed=True)}
        return self._known[id(view)]

    def platform(self):
        return self.state


def event(number: int, *, to: SeedStage = SeedStage.TRAINING, site: str = "stages.0") -> OonaMessage:
    body = LifecycleEvent(
        run_id=story.RUN, step=number, epoch=0, site=site, seed="s0", from_stage=SeedStage.GERMINATED, to_stage=to,
        reason=f"reason {number}",
    )  # fmt: skip
    return OonaMessage.of(Topic.LIFECYCLE, body, sender_id="trainer", key=story.RUN)


def read(messages: list[str]) -> list[tuple[str, str, dict]]:
    """(event, id, data) of each."""
    found = []
    for text in messages:
        fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
        found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
    return found


# ---------------------------------------------------------------- the pages


def test_the_runs_are_listed_with_links(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert f'<a href="/runs/{story.RUN}">{story.RUN}</a>' in answer.text
    assert "88.9%" in answer.text
    assert "1,434 → 2,666" in answer.text


def test_a_finished_run_is_whole_without_a_script(client):
    text = client.get(f"/runs/{story.RUN}").text
    assert "A network of 1,434 parameters grew to <em>2,666</em>" in text
    for site in story.SITES:
        assert f'<b title="{site}">' in text
    assert "residual_conv fine-tuning → fossilized" in text
    assert "Tamiyo for 1 epoch: no answer within 5.0 s" in text
    assert text.count("<h2") == 5
    assert 'lang="en"' in text
    assert 'class="skip" href="#main"' in text
    assert text.count('<main id="main">') == 1


def test_what_no_one_knows_is_not_shown_as_if_it_were_known(tmp_path):
    lay_down(tmp_path, seen=False)
    text = (
        TestClient(build_app(FolderRuns(RunStore(str(tmp_path))), where="here"), base_url="http://localhost")
        .get(f"/runs/{story.RUN}")
        .text
    )
    assert "health not measured" in text
    assert not re.search(r">health 0\.\d", text)
    assert "head.norm" not in text  # no adaptation there, so that no file but view.json names it
    assert "Not known from a folder" in text


def test_nothing_is_loaded_from_anywhere_else(client):
    for path in ("/", f"/runs/{story.RUN}", "/assets/page.css", "/assets/live.js", "/nothing"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import|https?://""", answer.text), path
        assert " style=" not in answer.text  # the policy forbids it


def test_names_from_models_cannot_become_markup(tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    view = LiveView(run_id="r", task=evil, num_epochs=1, sites={evil: f"vector-{evil}"}, decision=evil)
    note = Note(1, NOW, 0, 0, evil, evil, evil, Tone.BAD, SeedStage.CULLED)
    parts = parts_of(Picture(replace(view, notes=(note,)), None, [note]), PlatformState(NOW, missing=(evil,)), NOW)
    text = "".join(parts.values())
    assert "<img" not in text
    assert "&lt;img" in text


def test_absent_runs_and_pages_are_told_as_such(client):
    for path in ("/runs/absent", "/runs/absent/stream", "/runs/absent/notes?before=3", "/runs/..%2f..%2fetc", "/x"):
        assert client.get(path).status_code == 404, path
    assert client.get(f"/runs/{story.RUN}/notes?before=x").status_code == 400


def test_a_folder_that_cannot_be_read_is_a_503_with_its_reason(client, tmp_path):
    (tmp_path / "runs" / story.RUN / "view.json").write_text("{}")
    answer = client.get(f"/runs/{story.RUN}")
    assert answer.status_code == 503
    assert "view.json cannot be read" in answer.text


# ---------------------------------------------------------------- the door


def door(runs, **changes):
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    app = build_app(runs, where="here", token_digest=digest, **changes)
    return TestClient(app, base_url="http://example.org", follow_redirects=False)


def test_without_the_token_nothing_is_told(folder_runs):
    client = door(folder_runs)
    for path in ("/", f"/runs/{story.RUN}", f"/runs/{story.RUN}/stream", "/assets/live.js", "/health"):
        answer = client.get(path, headers={"accept": "text/html"})
        assert answer.status_code == 401
        assert story.RUN not in answer.text
        assert 'name="token"' in answer.text
    assert client.get("/", headers={"authorization": f"Bearer {TOKEN[:-1]}"}).status_code == 401
    assert client.get("/", headers={"authorization": f"Basic {TOKEN}"}).status_code == 401


def test_the_token_opens_by_header_or_by_the_form(folder_runs):
    client = door(folder_runs)
    assert client.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    wrong = client.post("/login", data={"token": "no"})
    assert wrong.status_code == 401
    assert "That is not the token" in wrong.text
    right = client.post("/login", data={"token": TOKEN})
    assert right.status_code == 303
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get(f"/runs/{story.RUN}").status_code == 200
    assert client.post("/login", content=b"x" * 5000, headers={"cookie": ""}).status_code == 413


def test_a_foreign_name_that_points_here_is_refused(folder_runs):
    app = build_app(folder_runs, where="here", hosts=("127.0.0.1", "localhost", "[::1]"))
    for host, status in (("127.0.0.1:8420", 200), ("[::1]:8420", 200), ("evil.example", 400), ("", 400)):
        assert TestClient(app).get("/", headers={"host": host}).status_code == status, host


# ---------------------------------------------------------------- the stream


def test_a_page_is_sent_what_changed_and_nothing_twice():
    runs = Told(followed(14))
    feed = RunFeed(runs, story.RUN, boot="b", after="")
    first = {name: data for name, _, data in read(feed.step(NOW))}
    assert first["notes"]["restart"]
    assert set(first["parts"]) >= {"head", "cards", "network", "growth", "bus"}
    assert feed.step(NOW) == []
    assert feed.step(NOW + 60) == []  # looked at again, and nothing to tell
    runs.live.apply(event(9_999))
    [(name, mark, notes), (_, _, parts)] = read(feed.step(NOW + 61))
    assert name == "notes"
    assert mark == f"b:{runs.live.view(story.RUN).num_notes}"
    assert notes["html"].count("<li") == 1
    assert not notes["restart"]
    # the one site that changed, not the network; its row, not the table
    drawn = {part for part in parts if part.startswith(("site", "row", "network"))}
    assert drawn == {"network-told", "site-0", "row-0"}


def test_whoever_comes_back_gets_what_is_missing():
    runs = Told(followed(14))
    had = runs.live.view(story.RUN).num_notes
    for number in range(3):
        runs.live.apply(event(9_000 + number))
    [(_, _, notes), _] = read(RunFeed(runs, story.RUN, boot="b", after=f"b:{had}").step(NOW))
    assert notes["html"].count("<li") == 3
    assert not notes["restart"]
    assert [
        data
        for name, _, data in read(RunFeed(runs, story.RUN, boot="b", after=f"b:{had + 3}").step(NOW))
        if name == "notes"
    ] == []
    # another life of the server counts anew
    [(_, _, anew), _] = read(RunFeed(runs, story.RUN, boot="c", after=f"b:{had}").step(NOW))
    assert anew["restart"]


def test_more_events_than_a_page_shows_begin_the_list_anew():
    runs = Told(followed(1))
    feed = RunFeed(runs, story.RUN, boot="b", after="")
    feed.step(NOW)
    for number in range(NUM_NOTES + 50):
        runs.live.apply(event(9_000 + number))
    [(_, _, notes), _] = read(feed.step(NOW + 1))
    assert notes["restart"]
    assert notes["html"].count("<li") == NUM_NOTES
    assert notes["earlier"] == runs.live.view(story.RUN).num_notes - NUM_NOTES


def test_earlier_events_are_had_page_by_page(tmp_path):
    events = tuple(
        LifecycleEvent(
            run_id=story.RUN, step=i, epoch=0, site="a", seed="s", from_stage=SeedStage.GERMINATED,
            to_stage=SeedStage.TRAINING, reason=f"reason {i}.",
        )
        for i in range(NUM_NOTES + 30)
    )  # fmt: skip
    lay_down(tmp_path, events=events, rungs=())
    client = TestClient(build_app(FolderRuns(RunStore(str(tmp_path))), where="here"), base_url="http://localhost")
    text = client.get(f"/runs/{story.RUN}").text
    assert f'data-first="{31}"' in text
    assert "reason 29." not in text
    earlier = client.get(f"/runs/{story.RUN}/notes?before=31").json()
    assert (earlier["first"], earlier["earlier"]) == (1, 0)
    assert earlier["html"].count("<li") == 30
    assert "reason 29." in earlier["html"]


def test_a_story_is_bounded_and_goes_with_its_run():
    live = Live(max_runs=1)
    for message in story.messages(0):
        live.apply(message)
    for number in range(3):
        live.apply(event(number))
    assert [note.reason for note in live.story(story.RUN)][-3:] == ["reason 0", "reason 1", "reason 2"]
    assert MAX_STORY >= 10_000
    other = story.run_started().model_copy(update={"run_id": "other"})
    live.apply(OonaMessage.of(Topic.RUN_STARTED, other, sender_id="t", key="other"))
    assert live.story(story.RUN) == []


# ---------------------------------------------------------------- what a run says


def test_silence_is_told_only_of_a_run_that_goes_on(folder_runs):
    picture = Told(followed(5)).picture(story.RUN)
    soon, late = picture.view.updated_at + SILENT_S - 1, picture.view.updated_at + SILENT_S + 60
    assert "Nothing needs attention" in parts_of(picture, None, soon)["attention"]
    assert "it may have been killed" in parts_of(picture, None, late)["attention"]
    assert "killed" not in parts_of(folder_runs.picture(story.RUN), None, late + 1e6)["attention"]


def test_an_open_alert_says_what_where_since_when_and_what_to_do():
    live = followed(5)
    alert = Alert(
        alert_id="a", kind=AlertKind.LOSS_RISE, run_id=story.RUN, site="stages.0", since=story.STARTED, since_step=40,
        updated_at=NOW, summary="the loss rises", evidence="0.9 against 0.4", detector="d", command="esper runs show",
    )  # fmt: skip
    live.apply(OonaMessage.of(Topic.ALERTS, alert, sender_id="nissa", key=story.RUN))
    told = parts_of(Told(live).picture(story.RUN), None, NOW)["attention"]
    assert "<b>stages.0, since 14:13:20, step 40:</b> the loss rises: 0.9 against 0.4. Look: esper runs show" in told
    over = alert.model_copy(update={"ended_at": NOW, "ending": "it fell"})
    live.apply(OonaMessage.of(Topic.ALERTS, over, sender_id="nissa", key=story.RUN))
    assert "loss rises" not in parts_of(Told(live).picture(story.RUN), None, NOW)["attention"]
    assert [note.text for note in live.story(story.RUN)][-2:] == ["the loss rises", "the loss rises: over"]


def test_the_bus_and_the_queue_say_what_they_know():
    bus = BusStats(
        num_shards=1,
        topics=(TopicStats(topic="system.events.epoch", published=30),),
        groups=(
            GroupStats(group="nissa", topics=("system.events.epoch",), pending=2, delivered=28, dropped=4, dead=1),
        ),
    )
    backlog = Backlog(queued={"cpu": 3}, leased={"cpu": 1}, work_s={"cpu": 12.0})
    state, later = PlatformState(NOW, bus, backlog), PlatformState(NOW + 2, bus, backlog)
    picture = Told(followed(5)).picture(story.RUN)
    parts = parts_of(picture, later, NOW, before=state)
    assert "<td>30</td><td>0</td>" in parts["bus"]
    assert "nissa never got 4 messages" in parts["attention"]
    assert "1 messages by nissa" in parts["attention"]
    assert "<td>3</td><td>1</td>" in parts["kernels"]
    silent = parts_of(picture, PlatformState(NOW, missing=("Oona did not answer: gone",)), NOW)
    assert "Oona did not answer" in silent["attention"]
    assert "Not known" in silent["bus"]


def test_a_platform_that_does_not_answer_is_named_and_asked_again(folder_runs, monkeypatch):
    clock, calls = SimpleNamespace(now=NOW, time=lambda: clock.now, monotonic=lambda: clock.now), []
    monkeypatch.setattr(source, "time", clock)

    def bus():
        calls.append(1)
        raise UnavailableError("gone")

    live = followed(3)
    runs = LiveRuns(lambda run: (live.view(run), live.story(run)), folder_runs, bus=bus, backlog=Backlog)
    state = runs.platform()
    assert state.missing == ("Oona did not answer: gone",)
    assert state.backlog == Backlog()
    assert runs.platform() is state
    assert len(calls) == 1
    picture = runs.picture(story.RUN)
    assert picture.is_followed
    assert picture is runs.picture(story.RUN)
    assert picture.status is RunStatus.FINISHED  # the summary's word
    clock.now += source._ASK_EVERY_S
    assert runs.platform() is not state
    assert len(calls) == 2


# ---------------------------------------------------------------- the folder


def test_a_run_reads_the_same_from_its_folder_as_from_the_bus(folder_runs):
    told, live = folder_runs.picture(story.RUN), followed()
    view = live.view(story.RUN)
    assert [(n.subject, n.text, n.reason, n.stage) for n in told.story] == [
        (n.subject, n.text, n.reason, n.stage) for n in live.story(story.RUN)
    ]
    assert told.view.points == view.points
    assert (told.view.params, told.view.params_start, told.view.outcomes) == (
        view.params, view.params_start, view.outcomes,
    )  # fmt: skip
    assert network.cells(told.view) == network.cells(view)


def test_a_view_is_kept_and_read_again():
    view = followed().view(story.RUN)
    assert load(dump(view)) == view
    with pytest.raises(StorageError, match=r"view\.json"):
        load(b"[1]")


def test_a_long_run_keeps_its_whole_curve():
    epochs = tuple(
        story.epoch_record(0).model_copy(update={"epoch": i, "num_epochs": 1_000, "step": i}) for i in range(1_000)
    )
    view = replay(story.summary(), story.history().model_copy(update={"epochs": epochs})).view
    assert len(view.points) == NUM_POINTS
    assert (view.points[0].epoch, view.points[-1].epoch) == (0, 999)


# ---------------------------------------------------------------- the pictures


def test_a_site_says_its_health_and_stage_in_words_too():
    cells = network.cells(followed(13).view(story.RUN))
    assert len(cells) == 3
    training = cells["site-1"]
    assert "residual_conv" in training
    assert ">training<" in training
    assert "health 0.80" in training
    assert "stroke-dasharray" in training
    assert "not measured" in network.cells(LiveView(run_id="r", sites={"a": "vector-4-float32-cpu"}))["site-0"]


def test_what_was_kept_stays_in_the_picture():
    view = followed().view(story.RUN)
    assert 's-fossilized"><path class="stem"' in network.picture(view)
    assert network.told(view) == "3 sites, 3 with a measured health, the lowest 0.80, no seed under way, 1 kernel kept."
    assert "stages.1</th><td>feature map" in network.rows(view)["row-1"]


def test_the_curves_tell_their_figures_and_mark_what_changed():
    live = followed()
    drawn = growth.panels(live.view(story.RUN), live.story(story.RUN))
    assert drawn.count("<figure") == 3
    assert 'aria-label="Parameters: live path from 1,434 to 2,666 over epochs 1 to 30"' in drawn
    for stage in ("grafting", "fossilized", "culled"):
        assert f'class="mark s-{stage}"' in drawn
    assert "nan" not in drawn
    assert "No epoch has ended yet" in growth.panels(LiveView(run_id="r"), [])
    first = followed(0)
    assert "from" in growth.panels(first.view(story.RUN), [])  # one point is no line, and no division by zero


def test_many_marks_are_thinned():
    view = followed().view(story.RUN)
    notes = [Note(i, NOW, 0, i % 510, "a", "x", stage=SeedStage.CULLED) for i in range(10_000)]
    assert growth.panels(view, notes).count('class="mark') <= 3 * 200
