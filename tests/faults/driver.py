"""A driver of its own for a test that kills it: `driver.py STORAGE MARKER PLACE STEP`. The run's id is `killed`."""

from __future__ import annotations

import sys
from pathlib import Path

import fault_support

from actors.launch import run
from jobs.workload import ConfiguredWorkload


def main() -> None:
    storage, marker, place, step = sys.argv[1:]
    config = fault_support.config(Path(storage))
    faults = fault_support.KillSelf(place, int(step), Path(marker))
    run(ConfiguredWorkload(config), config, run_id="killed", faults=faults)


if __name__ == "__main__":
    main()
