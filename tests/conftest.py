"""For every suite. Ray starts its workers at niceness 15, below this process and all else on a busy machine: there an
actor can wait longer for a core than any deadline allows, and a test fails that says nothing about the actor."""

import os

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it; before Ray is imported, and inherited
