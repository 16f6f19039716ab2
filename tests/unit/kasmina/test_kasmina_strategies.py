"""Strategies as schedules: their properties, and what they do in a host."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kasmina_support import DESIGNS, HOSTS, SITES, Driver, Shelf, assert_equal, class_loss, fingerprint, grown, wrapped

from esper.config import KasminaConfig
from esper.kasmina.strategies import MEASURED, QUARTERS, Course, Limits, judged, move
from esper.leyline import Action, BlendStrategy, SeedStage

GATED, DRIFT, LINKED = (
    BlendStrategy.GRAD_NORM_GATED,
    BlendStrategy.DRIFT_CONTROLLED,
    BlendStrategy.PERFORMANCE_LINKED,
)
ANY_FIGURE = st.one_of(st.none(), st.floats(0.0, 1e6), st.just(math.nan), st.just(math.inf))
RAMPS = st.sampled_from(["linear", "cosine", "sigmoid"])


def follow(strategy, figures, *, total, limits=None, released=1):
    course = Course(0.0, 0, total, released=released)
    courses = [course]
    for figure in figures:
        course = move(strategy, course, figure, limits or Limits())
        courses.append(course)
    return courses


@given(
    strategy=st.sampled_from([BlendStrategy.RAMP, *sorted(MEASURED)]),
    figures=st.lists(ANY_FIGURE, max_size=60),
    total=st.integers(1, 30),
    ramp=RAMPS,
    released=st.integers(0, QUARTERS),
)
def test_alpha_stays_in_its_range_and_is_one_only_at_the_end(strategy, figures, total, ramp, released):
    for course in follow(strategy, figures, total=total, limits=Limits(ramp), released=released):
        assert 0.0 <= course.alpha <= 1.0
        assert 0 <= course.done <= course.total
        assert (course.alpha == 1.0) >= (course.done == course.total)
        assert math.isfinite(course.typical)


@given(figures=st.lists(ANY_FIGURE, max_size=60), total=st.integers(1, 30), ramp=RAMPS)
@pytest.mark.parametrize("strategy", [BlendStrategy.RAMP, GATED, DRIFT])
def test_alpha_never_falls_and_never_outruns_the_curve(strategy, figures, total, ramp):
    limits = Limits(ramp)
    courses = follow(strategy, figures, total=total, limits=limits)
    free = follow(BlendStrategy.RAMP, figures, total=total, limits=limits)
    assert all(later.alpha >= earlier.alpha for earlier, later in pairwise(courses))
    assert all(course.alpha <= ramp.alpha + 1e-12 for course, ramp in zip(courses, free, strict=True))


@given(total=st.integers(1, 30), ramp=RAMPS, norm=st.floats(1e-6, 1e6))
def test_with_calm_figures_every_strategy_is_the_ramp(total, ramp, norm):
    limits = Limits(ramp)
    free = [course.alpha for course in follow(BlendStrategy.RAMP, [None] * total, total=total, limits=limits)]
    assert [c.alpha for c in follow(GATED, [norm] * total, total=total, limits=limits)] == free
    linked = follow(LINKED, [None] * total, total=total, limits=limits, released=QUARTERS)
    assert [c.alpha for c in linked] == free
    slow = Limits(ramp, drift_limit=1.0)
    assert [c.alpha for c in follow(DRIFT, [0.1] * total, total=total, limits=slow)] == free


def test_a_gradient_far_above_its_mean_holds_alpha_until_it_is_usual():
    courses = follow(GATED, [1.0, 1.0, 1.0, 5.0, 5.0, 1.0], total=20)
    assert [course.done for course in courses] == [0, 1, 2, 3, 3, 3, 4]
    lasting = follow(GATED, [1.0] * 3 + [5.0] * 60, total=60)
    assert lasting[-1].done > 20, "a lasting change of level opens the gate again"


@pytest.mark.parametrize("figure", [None, math.nan, math.inf])
@pytest.mark.parametrize("strategy", [GATED, DRIFT])
def test_what_was_not_measured_moves_nothing(strategy, figure):
    course = Course(0.25, 3, 10, typical=1.0)
    assert move(strategy, course, figure, Limits()) == course


@given(reaches=st.lists(st.floats(0.0, 1e4), min_size=1, max_size=80), total=st.integers(1, 30), ramp=RAMPS)
def test_the_output_never_moves_by_more_than_its_limit(reaches, total, ramp):
    limits = Limits(ramp, drift_limit=0.05)
    courses = follow(DRIFT, reaches, total=total, limits=limits)
    for (earlier, later), reach in zip(pairwise(courses), reaches, strict=True):
        assert (later.alpha - earlier.alpha) * reach <= 0.05 * (1 + 1e-9)


@given(reach=st.floats(0.0, 3.0), total=st.integers(1, 30), ramp=RAMPS)
def test_drift_control_ends_at_exactly_one(reach, total, ramp):
    courses = follow(DRIFT, [reach] * 400, total=total, limits=Limits(ramp))
    assert courses[-1].alpha == 1.0


def test_each_good_validation_releases_a_quarter_and_each_bad_one_takes_one_back():
    released, seen, course = 1, [], Course(0.0, 0, 8, released=1)
    for val_loss in (0.9, 0.9, 1.1, 1.1, 1.1, math.nan, 0.9, 0.9, 1.0, 1.0):
        for _ in range(8):
            course = move(LINKED, Course(course.alpha, course.done, 8, released=released), None, Limits("linear"))
        seen.append(course.alpha)
        released = judged(released, val_loss, 1.0)
    assert seen == [0.25, 0.5, 0.75, 0.5, 0.25, 0.0, 0.0, 0.25, 0.5, 0.75]
    assert released == QUARTERS


def test_direct_has_no_course():
    with pytest.raises(ValueError, match="direct"):
        move(BlendStrategy.DIRECT, Course(1.0, 0, 1), None, Limits())


# ---------------------------------------------------------------- in a host


def grafting(strategy, **settings):
    """A driver whose seed has just entered GRAFTING under a strategy."""
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf, config=KasminaConfig(ramp_epochs=2.0, **settings))
    driver = Driver("mlp", host)
    kernel_id = shelf.put("mlp_adapter", driver.signature("1"))
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id, strategy=strategy)
    driver.command(Action.ADVANCE, "1", "s0")
    from kasmina_support import SHADOW_GAIN

    for _ in range(2):
        driver.train(4)
        host.record_evidence("s0", SHADOW_GAIN)
        driver.close()
    driver.command(Action.ADVANCE, "1", "s0")
    assert driver.stage() is SeedStage.GRAFTING
    return driver


@pytest.mark.parametrize("strategy", sorted(MEASURED))
def test_every_strategy_goes_all_the_way_in_a_host(strategy):
    driver = grafting(strategy, drift_limit=0.2)
    alphas = [driver.seed().alpha]
    for _ in range(15):
        for _ in range(4):
            driver.train()
            alphas.append(driver.seed().alpha)
        driver.close(0.9)
    assert alphas[-1] == 1.0
    assert all(later >= earlier for earlier, later in pairwise(alphas))
    driver.command(Action.ADVANCE, "1", "s0")
    assert driver.stage() is SeedStage.STABILIZING


@pytest.mark.parametrize("strategy", sorted(MEASURED))
def test_a_resumed_graft_takes_the_same_course(strategy):
    """Saved at the end of an interval, as the trainer does; gradients and activations are not in a checkpoint."""
    first = grafting(strategy, drift_limit=0.02)
    first.run_epoch(0.9)
    assert 0.0 < first.seed().alpha < 1.0
    growth, weights = first.host.growth_state(), copy.deepcopy(first.host.state_dict())
    state = copy.deepcopy(first.optimizer.state_dict())
    second = grafting(strategy, drift_limit=0.02)
    second.host.load_growth_state(growth)
    second.host.load_state_dict(weights)
    second.optimizer = torch.optim.AdamW([p for _, p in second.host.live_parameters()][:6], lr=1e-2)
    second.optimizer.add_param_group({"params": [p for _, p in second.host.live_parameters()][6:]})
    second.optimizer.load_state_dict(state)
    second.step, second.epoch = first.step, first.epoch
    courses = []
    for driver in (first, second):
        torch.manual_seed(3)
        courses.append([])
        for _ in range(6):
            driver.train()
            courses[-1].append(driver.seed().alpha)
    assert courses[0] == courses[1]
    assert_equal(fingerprint(first), fingerprint(second))


def test_performance_that_is_worse_than_before_the_graft_holds_alpha_and_asks_for_removal():
    driver = grafting(LINKED, max_ramp_epochs=4)
    assert driver.seed().alpha == 0.0
    alphas = []
    for _ in range(4):
        driver.run_epoch(5.0)
        alphas.append(driver.seed().alpha)
    assert 0.0 < alphas[0] < 0.5
    assert alphas[-1] == 0.0
    signal = driver.reports[0].seeds[0]
    assert signal.should_cull
    assert "performance_linked" in signal.gate


def test_drift_is_averaged_over_ranks():
    driver = grafting(DRIFT)
    seen = []
    driver.host.share(
        lambda tensors: seen.extend(float(t) for t in tensors) or [t.fill_(1e9) for t in tensors], world=2
    )
    driver.train(4)
    assert len(seen) == 3, "the first step has nothing to share"
    before = driver.seed().alpha
    driver.train()
    assert driver.seed().alpha - before < 1e-9


# ---------------------------------------------------------------- the gradient upstream of a fully blended site


@pytest.mark.parametrize("name", HOSTS)
def test_the_hosts_gradient_upstream_of_a_blended_site_is_that_of_finite_differences(name):
    driver, site, _ = grown(name)
    assert SITES[name] == site
    assert DESIGNS[name]
    assert_upstream_gradient(driver)


@pytest.mark.parametrize("strategy", [*sorted(MEASURED), BlendStrategy.DIRECT])
def test_so_it_is_whatever_the_strategy(strategy):
    if strategy is BlendStrategy.DIRECT:
        shelf = Shelf()
        driver = Driver("mlp", wrapped("mlp", hub=shelf)).run_epoch()
        kernel_id = shelf.put("mlp_adapter", driver.signature("1"))
        driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id, strategy=strategy)
        driver.command(Action.ADVANCE, "1", "s0")
        driver.train(4)
    else:
        driver = grafting(strategy, drift_limit=0.2)
        for _ in range(15):
            driver.run_epoch(0.9)
    assert driver.stage() is SeedStage.GRAFTING
    assert driver.seed().alpha == 1.0
    assert_upstream_gradient(driver)


def assert_upstream_gradient(driver):
    host = driver.host.to(torch.float64).eval()
    x, y = driver.batches[0]
    x = x.double() if x.is_floating_point() else x
    upstream = [(key, p) for key, p in host.live_parameters() if not key.startswith("_esper.") and p.requires_grad][:2]

    def loss():
        return class_loss(host(x), y)

    for key, parameter in upstream:
        (gradient,) = torch.autograd.grad(loss(), [parameter])
        assert gradient.abs().max() > 0, f"{key} is cut off"
        flat, step = parameter.detach().view(-1), 1e-6
        for index in gradient.abs().flatten().argsort(descending=True)[:4].tolist():
            kept = flat[index].item()
            sides = []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                with torch.no_grad():
                    sides.append(float(loss()))
            flat[index] = kept
            measured = (sides[0] - sides[1]) / (2 * step)
            assert measured == pytest.approx(gradient.view(-1)[index].item(), rel=1e-5, abs=1e-8), key
