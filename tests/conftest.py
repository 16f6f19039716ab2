"""For every suite: Ray reads its environment once, when it is first imported, whichever test file does that.

Ray starts its workers at niceness 15, below this process and all else on a busy machine. There an actor can wait
longer for a core than any deadline allows, and a test fails that says nothing about the actor.
"""

import os
from importlib.util import find_spec

from actors.cluster import prepare_environment

if os.environ.get("ESPER_TEST_WITHOUT_RAY") != "1" and find_spec("ray") is not None:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    prepare_environment()
