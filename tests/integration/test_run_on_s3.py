"""The main job with its storage on an S3 server: the address and credentials by the usual AWS variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.leyline import RunStatus, SeedStage
from esper.storage import Storage
from jobs.runs import RunStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
ADDRESS = "s3://bucket/esper"


def test_a_run_on_s3_grows_and_leaves_all_that_a_directory_holds(s3_options, tmp_path):
    names = {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "key": "AWS_ACCESS_KEY_ID",
        "secret": "AWS_SECRET_ACCESS_KEY",
        "region": "AWS_REGION",
    }
    environment = {**os.environ, **{names[key]: value for key, value in s3_options.items()}}
    esper = Path(sys.executable).parent / "esper"
    changes = [
        f"tezzeret.key_file={tmp_path / 'key.pem'}",
        "tolaria.epochs=40",  # a kernel may come late, and all its stages take seven
        "tamiyo.max_adaptations=1",
        "tamiyo.startup_s=300",
        "tezzeret.optimize=never",
    ]
    done = subprocess.run(
        [esper, "train", "configs/digits.yaml", "--storage", ADDRESS, *changes],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    store = RunStore(ADDRESS, s3_options)
    (run,) = store.ids()
    summary = store.summary(run)
    fossils = [event for event in summary.events if event.to_stage is SeedStage.FOSSILIZED and not event.refused]
    assert (summary.status, len(fossils)) == (RunStatus.FINISHED, 1)
    folder = Storage.at(ADDRESS, s3_options).below("runs", run)
    assert {"config.yaml", "summary.json", "history.json", "report.html", "checkpoints"} <= set(folder.names())
