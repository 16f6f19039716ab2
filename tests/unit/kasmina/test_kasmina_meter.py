"""How often grafted kernels ran and how long they took: counted always, timed on sampled steps, told per interval."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kasmina_support import DESIGNS, SITES, Driver, Shelf, wrapped

from esper.kasmina.meter import Meter
from esper.leyline import Action, SeedStage


def grafting(*, observe_every):
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    driver = Driver("mlp", host, observe_every=observe_every)
    site = SITES["mlp"]
    driver.to_grafting(site, shelf.put(DESIGNS["mlp"], host.sites[site]))
    return driver, site


def signals(driver):
    return {report.layer_id: report.seeds[0] for report in driver.reports}


def test_forwards_on_the_live_path_are_counted_and_only_there():
    driver, site = grafting(observe_every=0)
    assert all(signal.runs == 0 and signal.latency_ms is None for signal in signals(driver).values())
    driver.train(3)
    with torch.no_grad():
        driver.host(driver.batches[0][0])  # as in a validation
    driver.close()
    found = signals(driver)
    assert found[site].runs == 4
    assert found[site].latency_ms is None  # no step was sampled
    assert sum(signal.runs for signal in found.values()) == 4
    driver.close()
    assert signals(driver)[site].runs == 0  # an interval of its own


def test_a_shadow_is_no_run_of_the_live_path():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    driver = Driver("mlp", host, observe_every=1)
    driver.to_training(SITES["mlp"], shelf.put(DESIGNS["mlp"], host.sites[SITES["mlp"]]))
    driver.run_epoch()
    assert all(signal.runs == 0 and signal.latency_ms is None for signal in signals(driver).values())


def test_time_is_taken_on_sampled_steps_of_training_alone(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("esper.kasmina.meter.perf_counter", lambda: next(ticks) / 1e3)  # a millisecond a look
    driver, site = grafting(observe_every=2)
    before = next(ticks)
    driver.train(4)
    with torch.no_grad():
        driver.host(driver.batches[0][0])
    driver.close()
    assert signals(driver)[site].runs == 5
    assert signals(driver)[site].latency_ms == pytest.approx(1.0)
    assert next(ticks) - before - 1 == 2 * 2  # two sampled steps, two looks each


def test_runs_count_though_they_are_undone():
    """A return to an older state gives back weights and seeds; the forwards were done."""
    driver, site = grafting(observe_every=1)
    state = driver.host.growth_state()
    driver.train(2)
    driver.host.load_growth_state(state)
    assert driver.stage() is SeedStage.GRAFTING
    driver.train(1).close()
    assert signals(driver)[site].runs == 3
    driver.command(Action.CULL, site, "s0")
    driver.run_epoch()
    assert signals(driver)[site].runs == 0


def test_a_copy_begins_anew_and_a_forward_that_raises_does_not_count():
    meter = Meter()
    meter.run("s", lambda: torch.ones(1), torch.device("cpu"))
    assert meter.runs("s").num == 1
    assert meter.runs("s").latency_ms >= 0.0
    for again in (copy.deepcopy(meter), pickle.loads(pickle.dumps(meter))):
        assert again.runs("s") == (0, None)

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        meter.run("s", fails, torch.device("cpu"))
    assert meter.runs("s").num == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_events_take_the_time_and_nothing_waits():
    meter, device = Meter(), torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    torch.cuda.synchronize()
    for _ in range(8):
        meter.run("s", lambda: torch.linalg.multi_dot([x] * 12), device)
    waits = meter.runs("s")
    assert waits.num == 8
    torch.cuda.synchronize()
    assert meter.runs("s").latency_ms > 0.05
