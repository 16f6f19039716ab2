"""The circuit breaker: when it gives up, when it tries again, and that every call of a trainer goes through it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolaria_support import config, train

from esper.kasmina.breaker import Breaker, guarded
from esper.leyline import NotFoundError, UnavailableError
from esper.leyline.signals import CircuitState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def silent():
    raise UnavailableError("no answer")


def fail(breaker, times):
    for _ in range(times):
        with pytest.raises(UnavailableError, match="no answer"):
            breaker.call(silent)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker("Urza", failures=3, rest_s=10.0, clock=clock)


def test_it_opens_after_so_many_failures_in_a_row(breaker):
    fail(breaker, 2)
    assert breaker.call(lambda: 7) == 7  # an answer between them, and the count begins anew
    fail(breaker, 2)
    assert breaker.state is CircuitState.CLOSED
    fail(breaker, 1)
    assert breaker.state is CircuitState.OPEN


def test_open_it_asks_nobody(breaker):
    fail(breaker, 3)
    with pytest.raises(UnavailableError, match="Urza was silent 3 times and is not asked for a while"):
        breaker.call(lambda: pytest.fail("it was asked"))
    assert breaker.circuit().refused == 1


def test_after_its_rest_one_call_closes_it_or_opens_it_again(breaker, clock):
    fail(breaker, 3)
    clock.now += 9.9
    assert breaker.state is CircuitState.OPEN
    clock.now += 0.1
    assert breaker.state is CircuitState.HALF_OPEN
    fail(breaker, 1)  # one is enough now
    assert breaker.state is CircuitState.OPEN
    assert breaker.circuit().opened == 2
    clock.now += 10
    assert breaker.call(lambda: 7) == 7
    assert breaker.state is CircuitState.CLOSED
    fail(breaker, 2)
    assert breaker.state is CircuitState.CLOSED


def test_half_open_only_one_call_tries(breaker, clock):
    fail(breaker, 3)
    clock.now += 10
    asked, answer = threading.Event(), threading.Event()

    def slow():
        asked.set()
        assert answer.wait(60)
        return 7

    first = threading.Thread(target=breaker.call, args=(slow,))
    first.start()
    assert asked.wait(60)
    with pytest.raises(UnavailableError, match="not asked"):
        breaker.call(lambda: pytest.fail("a second one tried"))
    answer.set()
    first.join()
    assert breaker.state is CircuitState.CLOSED


def test_a_refusal_is_an_answer(breaker):
    def refuse():
        raise NotFoundError("no such kernel")

    fail(breaker, 2)
    with pytest.raises(NotFoundError):
        breaker.call(refuse)
    fail(breaker, 2)
    assert breaker.state is CircuitState.CLOSED


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 12)), max_size=40))
def test_it_is_open_only_after_failures_and_never_longer_than_its_rest(calls):
    clock = Clock()
    breaker = Breaker("Urza", failures=3, rest_s=10.0, clock=clock)
    in_a_row, last_failure = 0, 0.0
    for answers, pause in calls:
        clock.now += pause
        before = breaker.state
        try:
            breaker.call((lambda: 1) if answers else silent)
        except UnavailableError as error:
            if "not asked" in str(error):
                assert before is CircuitState.OPEN
                assert in_a_row >= 3
                assert clock.now - last_failure < 10.0
                continue
            in_a_row, last_failure = in_a_row + 1, clock.now
        else:
            in_a_row = 0
            assert breaker.state is CircuitState.CLOSED


class Down:
    """A hub that does not answer, and counts who asks."""

    def __init__(self) -> None:
        self.asked = 0

    def __getattr__(self, name):
        def method(*args, **kwargs):
            self.asked += 1
            raise UnavailableError("no answer")

        return method


def test_every_method_of_the_hub_goes_through_it(breaker):
    hub = Down()
    through = guarded(hub, breaker)
    for call in (lambda: through.fetch("k"), lambda: through.pending([]), lambda: through.kernel("k")):
        with pytest.raises(UnavailableError, match="no answer"):
            call()
    with pytest.raises(UnavailableError, match="not asked"):
        through.count_kernels([])
    assert hub.asked == 3


def test_a_trainer_whose_urza_is_gone_asks_seldom_and_says_so(tmp_path):
    hub = Down()
    settings = config(deterministic=False, tolaria__epochs=6, kasmina__breaker_s=600, tamiyo__startup_s=1.0)
    summary, _ = train(tmp_path, settings, hub=hub)
    assert hub.asked < 12  # an eager trainer asks several times an epoch, and eight threads ask for kernels
    assert summary.urza.state is CircuitState.OPEN
    assert summary.urza.opened >= 1
    assert summary.urza.refused >= 5
    assert any(words.startswith("Urza: ") for words in summary.went_without)
