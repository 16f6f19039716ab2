"""A driver of its own, for a test that kills it: `driver.py FILE`, a pickled (config, run_id, faults, mark).

The process writes its id to `mark` before it begins.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from fault_support import WatchedWorkload

from actors.launch import run


def main() -> None:
    config, run_id, faults, mark = pickle.loads(Path(sys.argv[1]).read_bytes())
    mark.write_text(str(os.getpid()))
    run(WatchedWorkload(config), config, run_id=run_id, faults=faults)


if __name__ == "__main__":
    main()
