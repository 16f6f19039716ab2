"""The live page as people see it: headless Chromium on a page that is served as a run serves it, and on a real run."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import nissa_story as story
import pytest
from ray_head import wait_for
from test_live_page import lay_down

from esper.leyline.kernels import SiteKind, SiteSignature
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import EpochRecord, HealthSignal, LayerHealthReport, LifecycleEvent, RunStarted
from esper.nissa import compare
from esper.nissa.live import Live
from esper.nissa.runs import RunStore
from esper.nissa.web import FolderRuns, LiveRuns, PageServer, build_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; .ci/packages installs it"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

RUN = "run-large"
NUM_SITES, NUM_EVENTS, EPOCHS = 200, 10_000, 20
PATIENCE_MS = 120_000
"""Only what hangs takes so long."""
SIGNATURE = SiteSignature(kind=SiteKind.VECTOR, channels=8)
LIFE = [
    SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.GRAFTING, SeedStage.STABILIZING,
    SeedStage.EVALUATING, SeedStage.FINE_TUNING, SeedStage.FOSSILIZED,
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser):
    """Opens pages that must not complain and must not ask anybody else for anything."""
    contexts = []
    complaints: list[str] = []

    def opened(address: str, *, may_lose: bool = False, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if not may_lose:
            page.on("console", lambda message: complaints.append(message.text))
        origin = re.match(r"https?://[^/]+", address)[0]
        page.on("request", lambda asked: asked.url.startswith((origin, "data:")) or complaints.append(asked.url))
        page.goto(address)
        page.wait_for_selector("#link[data-state=live]", timeout=PATIENCE_MS)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


class Fed:
    """A page of a run that is fed here, as Nissa's consumer feeds its own."""

    def __init__(self, root: Path) -> None:
        self.live, self.lock = Live(), threading.Lock()
        self.runs = LiveRuns(self.told, FolderRuns(RunStore(str(root))))
        self.server = self.serve(0)

    def serve(self, port: int, ending: threading.Event | None = None) -> PageServer:
        def make_app():
            return build_app(self.runs, where="here", tick_s=0.1, ending=ending)

        return PageServer(make_app, host="127.0.0.1", port=port, ending=ending)

    def told(self, run_id):
        with self.lock:
            view = self.live.view(run_id)
            return None if view is None else (view, self.live.story(run_id))

    def send(self, topic, *bodies) -> None:
        for body in bodies:
            message = OonaMessage.of(topic, body, sender_id="trainer", key=RUN)
            with self.lock:
                self.live.apply(message)

    @property
    def view(self):
        with self.lock:
            return self.live.view(RUN)


@pytest.fixture
def fed(tmp_path):
    fed = Fed(tmp_path)
    yield fed
    fed.server.close()


def started(num_sites: int = NUM_SITES) -> RunStarted:
    sites = {f"blocks.{i // 4}.part{i % 4}": SIGNATURE for i in range(num_sites)}
    return RunStarted(
        run_id=RUN, task="classification", num_epochs=EPOCHS, sites=sites, params=10_000, directory="nowhere"
    )


def transition(number: int) -> LifecycleEvent:
    """Seeds take turns; each goes through its life again and again."""
    site, place = number % NUM_SITES, (number // NUM_SITES) % (len(LIFE) - 1)
    return LifecycleEvent(
        run_id=RUN, step=number, epoch=number * EPOCHS // NUM_EVENTS, site=f"blocks.{site // 4}.part{site % 4}",
        seed=f"s{site}", blueprint="mlp_adapter", from_stage=LIFE[place], to_stage=LIFE[place + 1],
        reason=f"event {number}",
    )  # fmt: skip


def epoch(number: int) -> EpochRecord:
    return EpochRecord(
        run_id=RUN, epoch=number, num_epochs=EPOCHS, step=(number + 1) * NUM_EVENTS // EPOCHS,
        train_loss=2 / (number + 1), val_loss=2.1 / (number + 1), val_metric=1 - 0.9 / (number + 1),
        metric_name="accuracy", params=10_000 + 500 * number,
    )  # fmt: skip


def health(number: int, site: int) -> LayerHealthReport:
    name, score = f"blocks.{site // 4}.part{site % 4}", (site * 7 + number * 3) % 101 / 100
    signal = HealthSignal(layer_id=name, seed_id=f"s{site}", epoch=number, health_score=score, grow_potential=score)
    step = number * NUM_EVENTS // EPOCHS
    return LayerHealthReport(run_id=RUN, layer_id=name, signature=SIGNATURE, epoch=number, step=step, seeds=(signal,))


def comes_to(expected, ask) -> None:
    """The page draws a few elements a frame: it is asked again until all are there."""
    until = time.monotonic() + PATIENCE_MS / 1e3
    while (found := ask()) != expected and time.monotonic() < until:
        time.sleep(0.05)
    assert found == expected


def test_it_keeps_up_with_200_sites_and_10_000_events(fed, look, tmp_path):
    fed.send(Topic.RUN_STARTED, started())
    page = look(f"{fed.server.address}/runs/{RUN}", viewport={"width": 1180, "height": 900})
    assert page.locator("#network .site").count() == NUM_SITES
    page.evaluate("""() => {
      window.longest = 0;
      new PerformanceObserver(list => list.getEntries().forEach(entry => {
        window.longest = Math.max(window.longest, entry.duration); })).observe({entryTypes: ['longtask']});
    }""")
    measured = page.context.new_cdp_session(page)
    measured.send("Performance.enable")

    def layouts() -> float:
        metrics = measured.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "LayoutCount")

    each, before = NUM_EVENTS // EPOCHS, layouts()
    for number in range(EPOCHS):  # the page is up to date while it goes on, not only at the end
        fed.send(Topic.SEED_HEALTH, *(health(number, site) for site in range(NUM_SITES)))
        fed.send(Topic.EPOCH, epoch(number))
        fed.send(Topic.LIFECYCLE, *(transition(i) for i in range(number * each, (number + 1) * each)))
        page.wait_for_selector(f"#note-{(number + 1) * each}", state="attached", timeout=PATIENCE_MS)
    # laid out once a frame, not once an element: that alone took more than half of the time
    assert layouts() - before < NUM_SITES * EPOCHS / 2
    last = fed.view
    assert last.num_notes == NUM_EVENTS
    page.wait_for_function(
        "params => document.getElementById('cards').innerText.includes(params)",
        arg=f"{last.params:,}",
        timeout=PATIENCE_MS,
    )
    stages = {seed.site: seed.stage.value.lower().replace("_", "-") for seed in last.seeds.values()}

    def behind() -> list[str]:
        """Sites of which the page shows another stage."""
        cells = page.eval_on_selector_all(
            "#network .site", "sites => sites.map(s => [s.querySelector('b').title, s.innerText])"
        )
        shown = dict(cells)
        assert len(shown) == NUM_SITES
        return [site for site, stage in stages.items() if stage not in shown[site]]

    comes_to([], behind)
    arcs = "arcs => arcs.map(a => a.getAttribute('stroke-dasharray'))"
    expected = [f"{100 * seed.health_score:.0f} 100" for seed in last.seeds.values()]
    comes_to(expected, lambda: page.eval_on_selector_all("#network .arc", arcs))
    # what was streamed stays on the page up to a bound; what is older can be had
    assert page.locator("#notes > li").count() <= 2_000
    oldest = int(page.get_attribute("#notes", "data-first"))
    page.click("#earlier")
    page.wait_for_selector(f"#note-{oldest - 1}", state="attached", timeout=PATIENCE_MS)
    longest, updates = page.evaluate("[window.longest, document.body.dataset.parts]")
    words = "longest task %.0f ms, %s updates, %.0f layouts"
    logging.getLogger("esper.tests").info(words, longest, updates, layouts() - before)
    page.screenshot(path=tmp_path / "large.png", full_page=True)
    assert (tmp_path / "large.png").stat().st_size > 50_000


def test_it_comes_back_after_the_server_was_gone(fed, look):
    fed.send(Topic.RUN_STARTED, started(3))
    fed.send(Topic.LIFECYCLE, *(transition(i) for i in range(2)))
    page = look(f"{fed.server.address}/runs/{RUN}", may_lose=True)
    page.wait_for_selector("#note-2", state="attached", timeout=PATIENCE_MS)
    port = int(fed.server.address.rpartition(":")[2])
    fed.server.close()
    page.wait_for_selector("#link[data-state=lost]", timeout=PATIENCE_MS)
    fed.send(Topic.LIFECYCLE, *(transition(i) for i in range(2, 5)))
    fed.server = fed.serve(port)
    assert fed.server.address.endswith(f":{port}")
    page.wait_for_selector("#link[data-state=live]", timeout=PATIENCE_MS)
    page.wait_for_selector("#note-5", state="attached", timeout=PATIENCE_MS)
    assert [item.get_attribute("id") for item in page.locator("#notes > li").all()] == [
        f"note-{i}" for i in (5, 4, 3, 2, 1)
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_says_that_its_server_has_ended_and_keeps_the_last_picture(fed, look, tmp_path, scheme):
    fed.server.close()
    fed.server = fed.serve(0, threading.Event())
    fed.send(Topic.RUN_STARTED, started(3))
    page = look(f"{fed.server.address}/runs/{RUN}", may_lose=True, color_scheme=scheme)
    assert not page.is_visible("#over")
    with fed.lock:  # told right before the end: the last picture has it
        fed.live.apply(OonaMessage.of(Topic.LIFECYCLE, transition(0), sender_id="trainer", key=RUN))
    fed.server.close()
    page.wait_for_selector("#link[data-state=over]", timeout=PATIENCE_MS)
    assert page.inner_text("#link") == "ended: this is the last picture"
    assert "esper ui run-large --storage here" in page.inner_text("#over")
    page.wait_for_selector("#note-1", state="attached", timeout=PATIENCE_MS)  # it is drawn in the next frame
    assert page.locator("#note-1").count() == 1
    assert page.locator("#network .site").count() == 3
    assert page.evaluate(_LEAST_CONTRAST) >= 4.5
    assert len(page.screenshot(path=tmp_path / f"over-{scheme}.png")) > 10_000


_GAPS = """
[...document.querySelectorAll('.panel')].map(panel =>
  panel.querySelector('.ys span').getBoundingClientRect().top
  - panel.querySelector('figcaption span').getBoundingClientRect().bottom)
"""


@pytest.mark.parametrize("width", [390, 1180])
def test_the_words_of_a_comparison_do_not_lie_on_each_other(browser, tmp_path, width):
    lay_down(tmp_path)
    folder = tmp_path / "runs" / "digits-20261121-201953-0b8ab0"
    shutil.copytree(tmp_path / "runs" / story.RUN, folder)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace(story.RUN, folder.name))
    written = compare.write(compare.gather(RunStore(str(tmp_path)), [story.RUN, folder.name]), tmp_path / "c.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(written.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    gaps = page.evaluate(_GAPS)
    assert len(gaps) == 4
    assert min(gaps) >= 0
    last = page.locator("table.compared thead th").last
    assert last.evaluate("head => head.getBoundingClientRect().right") <= width
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_on_a_phone_and_by_keyboard(fed, look, scheme):
    fed.send(Topic.RUN_STARTED, started(6))
    fed.send(Topic.EPOCH, epoch(0), epoch(1))
    fed.send(Topic.LIFECYCLE, *(transition(i) for i in range(5)))
    page = look(
        f"{fed.server.address}/runs/{RUN}", viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True
    )
    page.wait_for_selector("#note-5", state="attached", timeout=PATIENCE_MS)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == {
        "light": "rgb(246, 247, 249)", "dark": "rgb(15, 19, 25)",
    }[scheme]  # fmt: skip
    # no text of a picture is smaller than can be read, and none is paler than WCAG AA asks for
    assert page.evaluate(_LEAST_CONTRAST) >= 4.5
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"filter", "SUMMARY"} <= reached
    page.select_option("#filter", "good")
    assert page.locator("#notes > li:visible").count() == 0


_LEAST_CONTRAST = """() => {
  const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  let least = 21;
  for (const node of document.querySelectorAll('main *, header *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest('svg') || node.classList.contains('sr')) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}"""


@pytest.mark.ray
def test_a_run_of_the_main_job_is_seen_growing(look, tmp_path):
    from playwright.sync_api import expect
    from test_interrupts import Driver

    def says(where: str, words: str) -> None:
        # each part comes as often as it changes, the bus every few seconds
        expect(page.locator(where)).to_contain_text(words, timeout=PATIENCE_MS)

    driver = Driver(  # of more epochs than anybody waits for: it ends by an interrupt
        tmp_path, "configs/digits.yaml", "tolaria.epochs=2000", "nissa.view=plain", "nissa.page.port=0",
        "tezzeret.optimize=never", "--storage", str(tmp_path),
    )  # fmt: skip
    try:

        def link():
            assert driver.process.poll() is None, driver.output.read_text()
            return re.search(r"^live page: (\S+)$", driver.output.read_text(), re.MULTILINE)

        address = wait_for(link, "the link", timeout_s=240)[1]
        page = look(address, may_lose=True, viewport={"width": 1180, "height": 900})
        says("h1", "A network of 94 parameters")
        page.wait_for_selector("h1 em", timeout=PATIENCE_MS * 2)  # it has grown
        page.wait_for_selector(".network .plant", timeout=PATIENCE_MS)
        says("#notes", "→ grafting")
        says("#bus", "system.events.epoch")
        picture = page.screenshot(path=tmp_path / "growing.png", full_page=True)
        assert len(picture) > 30_000
        driver.process.send_signal(signal.SIGINT)
        driver.end()
        # its Ray has ended, and the page with it: it says so, and its last picture stays
        page.wait_for_selector("#link[data-state=over]", timeout=PATIENCE_MS)
        assert page.inner_text("#link") == "the run is over (interrupted): this is its last picture"
        assert page.is_visible("#over")
        assert page.locator(".network .plant").count()
        page.screenshot(path=tmp_path / "over.png")
    finally:
        driver.close()
    assert (driver.folder / "view.json").is_file()
    told = RunStore(str(tmp_path)).told(driver.folder.name)
    assert any(seed.health_score is not None for seed in told.view.seeds.values())  # no other file says it
