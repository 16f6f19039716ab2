"""A run that listens: it obeys what was decided from the memory it has, and nothing else."""

from __future__ import annotations

from functools import partial

import pytest
from tolaria_support import config, train

from esper.leyline import (
    AdaptationSignal,
    BudgetState,
    ConfigError,
    EpochRecord,
    OonaMessage,
    RunHistory,
    RunStatus,
    SeedStage,
    SystemStatePacket,
    Topic,
    UnavailableError,
)
from esper.oona import MemoryBus
from esper.tamiyo import initial_state
from esper.tamiyo.deciders import Steps
from esper.tamiyo.gathering import TOPICS, Gathering
from esper.tolaria.listening import WATCHER, ListeningController

CONFIG = config(deterministic="false", tamiyo__control="listen", tamiyo__listen_s=0.0).tamiyo
MEMORY = initial_state(CONFIG, 0)


def packet(epoch):
    record = EpochRecord(run_id="run", epoch=epoch, num_epochs=20, step=epoch, train_loss=1.0)
    return SystemStatePacket(run_id="run", epoch=record, layers=(), budget=BudgetState(params_used=1, flops_used=1))


class Watched:
    """A run that listens, on a clock that stands still, and who tells it what to do."""

    def __init__(self):
        self.bus, self.now = MemoryBus(), 0.0
        self.controller = ListeningController(self.bus, CONFIG, initial_state=lambda: MEMORY, clock=lambda: self.now)
        self.states = self.bus.subscribe([Topic.RUN_STATE], group="test", from_start=True)

    def decide(self, epoch, memory=None):
        return self.controller.decide(memory or {}, packet(epoch))

    def told(self):
        self.bus.flush()
        deliveries = self.states.poll(timeout_s=0.5)
        self.states.ack(deliveries)
        return [delivery.message.body() for delivery in deliveries]

    def tell(self, epoch, memory, *, sender=WATCHER, run_id="run"):
        signal = AdaptationSignal(run_id=run_id, epoch=epoch, policy="p", reason=f"of {epoch}", memory=memory)
        self.bus.publish([OonaMessage.of(Topic.KASMINA_COMMANDS, signal, sender_id=sender, key=run_id)])
        self.bus.flush()


@pytest.fixture
def watched():
    watched = Watched()
    yield watched
    watched.controller.close()
    watched.bus.close()


def test_it_tells_its_state_and_waits_while_nobody_says_anything(watched):
    memory, signal = watched.decide(0)
    [state] = watched.told()
    assert (memory, state.memory, state.epoch) == (MEMORY, MEMORY, 0)
    assert (signal.epoch, signal.commands) == (0, ())
    assert "no command has come" in signal.reason


def test_what_came_late_is_obeyed_at_the_next_epoch_if_it_still_holds(watched):
    watched.decide(0)
    watched.tell(0, {"after": 0})
    memory, signal = watched.decide(1)
    assert (memory, signal.epoch, signal.memory) == ({"after": 0}, 1, None)
    assert signal.reason == "of 0 (decided after epoch 1)"


def test_of_several_the_newest_counts(watched):
    watched.decide(0)
    watched.decide(1)
    watched.tell(1, {"after": 1})
    watched.tell(0, {"after": 0})
    assert watched.decide(2)[0] == {"after": 1}


def test_what_was_decided_from_another_memory_is_overtaken(watched):
    watched.decide(0)
    watched.decide(1)
    watched.tell(0, {"after": 0})
    memory, _ = watched.decide(2)  # obeys epoch 0's
    watched.tell(1, {"after": 1})  # decided before, from the memory of before
    again, signal = watched.decide(3, memory)
    assert (again, "no command" in signal.reason) == (memory, True)
    watched.tell(3, {"after": 3})
    assert watched.decide(4, memory)[0] == {"after": 3}


@pytest.mark.parametrize("sender", ["tolaria", "somebody"])
def test_what_others_put_on_the_topic_is_no_command(watched, sender):
    watched.decide(0)
    watched.tell(0, {"after": 0}, sender=sender)
    assert watched.decide(1)[0] == MEMORY


def test_it_hears_no_other_runs_commands_and_none_that_are_too_old(watched):
    watched.decide(0)
    watched.tell(0, {"after": 0}, run_id="another")
    assert watched.decide(1)[0] == MEMORY
    watched.tell(0, {"after": 0})
    for epoch in range(2, 5):
        watched.controller._told[epoch] = ""  # epochs in which it did not listen
    assert watched.decide(5)[0] == MEMORY


def test_it_complains_once_nobody_watches(watched):
    watched.decide(0)
    watched.now = CONFIG.startup_s + 1.0
    with pytest.raises(UnavailableError, match="nobody who watches"):
        watched.decide(1)
    watched.tell(1, MEMORY)
    watched.decide(2)
    watched.decide(3)
    watched.now += CONFIG.deadline_s + 1.0
    with pytest.raises(UnavailableError, match="for 5 s"):
        watched.decide(4)


def test_a_whole_run_grows_by_what_it_hears(tmp_path):
    """The watcher answers as each state is published: what it decides is what the run would have been answered."""

    class Watching(MemoryBus):
        def __init__(self):
            super().__init__()
            self.gathering, self.steps, self.num_told = Gathering(), Steps(), 0

        def publish(self, messages):
            super().publish(messages)
            for message in messages:
                question = self.gathering.take(message.body()) if message.topic in TOPICS else None
                if question is None:
                    continue
                [(state, signal)] = self.steps.decide([question])
                told = signal.model_copy(update={"memory": state})
                super().publish([OonaMessage.of(Topic.KASMINA_COMMANDS, told, sender_id=WATCHER, key=message.key)])
                self.num_told += 1

    chosen = config(deterministic="false", tamiyo__control="listen", tamiyo__listen_s=5.0)
    bus = Watching()
    controller = ListeningController(bus, chosen.tamiyo, initial_state=partial(initial_state, chosen.tamiyo, 0))
    summary, _ = train(tmp_path, chosen, bus=bus, controller=controller)
    controller.close()
    bus.close()
    assert (summary.status, summary.went_without, bus.num_told) == (RunStatus.FINISHED, (), 8)
    assert summary.events[0].to_stage is SeedStage.GERMINATED
    decisions = RunHistory.model_validate_json((tmp_path / "history.json").read_text()).decisions
    assert "germinating" in decisions[0][1]


def test_a_deterministic_run_must_ask():
    with pytest.raises(ConfigError, match="must ask"):
        config(tamiyo__control="listen")
