"""A real training with its experience, in a process that may be killed: `python small_training.py STORAGE KILL_AT`."""

from __future__ import annotations

import os
import signal
import sys
import threading

from esper.api import configured_workload, local_hub, train_local
from esper.config import RunConfig
from esper.data import load_data
from esper.kasmina.sites import find_sites
from esper.simic.experience import ExperienceWriter, about_run
from esper.storage import Storage
from esper.tamiyo import LocalController

EPOCHS = 9


class KillAt:
    """Kills this process, with no word, right before the decision of an epoch is told to the log. What was to be
    written three epochs before lies in the log by then, however slow the storage.
    """

    def __init__(self, epoch):
        self.epoch = epoch

    def at(self, place, step):
        if place == "control" and step == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        if place == "control" and step <= self.epoch - 3:
            for thread in threading.enumerate():
                if thread.name == "experience":
                    thread.join()


def main(storage, kill_at):
    config = RunConfig.model_validate(
        {
            "data": {"type": "digits", "layout": "flat"},
            "host": {"type": "mlp", "hidden": [8]},
            "storage": storage,
            "deterministic": True,
            "tolaria": {"epochs": EPOCHS, "batch_size": 64},
            "tamiyo": {"warmup_epochs": 1, "plateau_window": 1, "plateau_threshold": 0.9},
            "tezzeret": {"blueprints": ["mlp_adapter"]},
            "simic": {"rows_per_write": 2},
        }
    )
    data = load_data(config.data, task=config.task, seed=config.seed)
    workload = configured_workload(config, data)
    hub, key = local_hub(find_sites(workload.model, workload.example, sites="auto").values(), config)
    place = Storage.at(storage)
    return train_local(
        workload,
        config,
        directory=f"{storage}/runs/small",
        run_id="small",
        hub=hub,
        bus=None,
        controller=LocalController(config.tamiyo, seed=0),
        public_key=key,
        resume=True,
        faults=KillAt(kill_at),
        experience=ExperienceWriter(place, about_run(config, "small"), config.simic),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
