"""A trainer in a process of its own, for tests that kill it: `chaos_trainer.py FOLDER PLAN`, PLAN as JSON.

The run is deterministic, grows one kernel, and meets one NaN on its way, so that it goes back once. A second call with
the same folder resumes it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import tolaria_support as support
import torch

from esper.leyline import RunStatus

SICK_STEP = 11
"""In the middle of an epoch, after the graft."""


@dataclass
class Faults:
    """A NaN in the host's weights at one step, always; and besides what the plan says, once in the run's life.

    Attributes:
        model: the host.
        folder: of the run.
        place, step: where; a step of None is the first time that the place is reached.
        outage_s: seconds for which the run's storage fails; None kills this process instead, as `kill -9` does.
    """

    model: torch.nn.Module
    folder: Path
    place: str = ""
    step: int | None = None
    outage_s: float | None = None
    threads: list[threading.Thread] = field(default_factory=list)

    def at(self, place: str, step: int) -> None:
        if (place, step) == ("step", SICK_STEP):
            next(self.model.parameters()).data.view(-1)[0] = float("nan")
        if place != self.place or step != (step if self.step is None else self.step):
            return
        marker = self.folder.with_suffix(".fired")
        if marker.exists():
            return
        marker.touch()
        if self.outage_s is None:
            os.kill(os.getpid(), signal.SIGKILL)
        self._fail(self.outage_s)

    def _fail(self, seconds: float) -> None:
        """Where the run's folder was, there is a file for a while: nothing below it can be read or written."""
        aside = self.folder.with_suffix(".aside")
        shutil.move(self.folder, aside)
        self.folder.touch()

        def mend() -> None:
            time.sleep(seconds)
            self.folder.unlink()
            shutil.move(aside, self.folder)

        self.threads.append(threading.Thread(target=mend))
        self.threads[0].start()


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    chosen = support.config()
    problem = support.workload(chosen)
    faults = Faults(problem.model, folder, **plan)
    resume = (folder / "checkpoints").is_dir()
    summary, _ = support.train(folder, chosen, problem=problem, faults=faults, resume=resume)
    for thread in faults.threads:
        thread.join()
    assert summary.status is RunStatus.FINISHED
    sys.stdout.write(json.dumps({"rollbacks": len(summary.rollbacks), "resumed": resume}))


if __name__ == "__main__":
    main()
