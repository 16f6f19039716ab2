"""Plans of growth as they are drawn. That runs follow them is tested in `tests/integration/test_rollouts.py`."""

import random

from esper.config import TamiyoConfig
from esper.simic.explorer import Plan


def test_plans_begin_at_once_half_of_the_time_and_never_too_late():
    config = TamiyoConfig(max_adaptations=3, last_epoch_fraction=0.5)
    plans = [Plan.drawn(random.Random(i), config, 20) for i in range(400)]
    assert 0.4 < sum(plan.start == 0 for plan in plans) / 400 < 0.65
    assert {plan.start for plan in plans} == set(range(10))
    assert {plan.num for plan in plans} == {1, 2, 3}
