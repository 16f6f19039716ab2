"""Structured logs: one event a line, with what was bound where it was logged."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading

import pytest

from esper.nissa.logs import ROOTS, bind, configure


@pytest.fixture(autouse=True)
def _restored():
    loggers = [logging.getLogger(root) for root in ROOTS]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in logger.handlers:
            if handler not in handlers:
                handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def test_json_lines_in_a_file(tmp_path):
    configure(tmp_path / "log.jsonl", actor="urza")
    log = logging.getLogger("esper.kasmina")
    with bind(run="r1"), bind(step=7):
        log.info("seed.grafted", extra={"site": "blocks.1", "alpha": 0.5})
    log.debug("seed.watched")
    log.warning("seed.culled")
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first.pop("at").endswith("+00:00")
    assert first == {
        "level": "info", "logger": "esper.kasmina", "event": "seed.grafted", "actor": "urza", "run": "r1", "step": 7,
        "site": "blocks.1", "alpha": 0.5,
    }  # fmt: skip
    assert set(second) == {"at", "level", "logger", "event", "actor"}


def test_key_value_on_a_stream_and_a_second_call_replaces_the_first():
    old, new = io.StringIO(), io.StringIO()
    configure(old)
    configure(new, level=logging.WARNING)
    log = logging.getLogger("esper.tamiyo")
    log.info("packet.decided")
    log.warning("seed.culled", extra={"site": "a", "reason": 'no "gain"\nat all'})
    assert old.getvalue() == ""
    assert new.getvalue()[9:] == 'warning seed.culled site=a reason="no \\"gain\\"\\nat all"\n'


def test_a_traceback_stays_with_its_event():
    stream = io.StringIO()
    configure(stream, form="json")
    try:
        raise ValueError("lost")  # noqa: TRY301 (the traceback is what is tested)
    except ValueError:
        logging.getLogger("esper.oona").exception("bus.lost")
    assert json.loads(stream.getvalue())["traceback"].endswith("ValueError: lost")


def test_what_is_bound_stays_in_its_thread():
    stream = io.StringIO()
    configure(stream, form="json")
    with bind(run="r1"):
        thread = threading.Thread(target=lambda: logging.getLogger("esper.x").info("thing.done"))
        thread.start()
        thread.join()
    assert "run" not in json.loads(stream.getvalue())


def test_nissa_needs_neither_torch_nor_ray_nor_plotly_to_start():
    code = "import sys, esper.nissa; print([m for m in ('torch', 'ray', 'plotly', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
