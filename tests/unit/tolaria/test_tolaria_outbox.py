"""Steps travel together: few messages where they are fast, and no long silence where they are slow."""

from __future__ import annotations

import pytest

from esper.leyline.messages import Topic
from esper.oona.memory import MemoryBus
from esper.tolaria.outbox import Outbox
from esper.tolaria.reach import Reach


@pytest.mark.parametrize(
    ("milliseconds", "num_steps", "sizes"),
    [
        (0.5, 600, [256, 256]),  # more would be a large message
        (2.0, 250, [100, 100]),  # as long as a glance
        (50.0, 50, [20, 20]),
        (150.0, 30, [14, 14]),  # every two seconds
        (9000.0, 3, [1, 1, 1]),
    ],
)
def test_how_many_travel_together_follows_from_how_long_they_take(milliseconds, num_steps, sizes):
    bus = MemoryBus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    outbox = Outbox(bus, run_id="r", reach=Reach(patient=False, stop=lambda: None))
    for step in range(num_steps):
        outbox.step(step, 0.5, milliseconds, steps_per_epoch=num_steps)
    outbox.flush()
    came = subscription.poll(timeout_s=10.0)
    subscription.ack(came)
    told = [delivery.message.body() for delivery in came]
    assert [len(batch.losses) for batch in told] == sizes
    outbox.send_steps(steps_per_epoch=num_steps)  # as at the end of an epoch
    outbox.flush()
    told += [delivery.message.body() for delivery in subscription.poll(timeout_s=0.1)]
    assert [batch.first_step for batch in told] == [sum(sizes[:i]) for i in range(len(told))]
    assert sum(len(batch.losses) for batch in told) == num_steps
    bus.close()
