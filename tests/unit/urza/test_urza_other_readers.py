"""The catalogue read by other tools, straight from the storage address, without Esper."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from urza_samples import WIDE, compiled, report_of

from esper.leyline import KernelStatus
from esper.storage import Storage
from esper.urza.hub import Hub

WITH_POLARS = """
import json, sys
import polars as pl

root = sys.argv[1]
options = json.loads(sys.argv[2])
kernels = pl.scan_delta(f"{root}/kernels", storage_options=options)
blueprints = pl.scan_delta(f"{root}/blueprints", storage_options=options)
events = pl.scan_delta(f"{root}/events", storage_options=options)
rows = (
    kernels.filter((pl.col("status") == "VALIDATED") & pl.col("tags").list.contains("small"))
    .join(blueprints.select("blueprint_id", "version"), on="blueprint_id")
    .select("blueprint_name", "version", "signature", "performance", "fossilized", "num_parameters")
    .sort("blueprint_name")
    .collect()
)
counts = events.group_by("kind").len().collect()
print(json.dumps({"rows": rows.to_dicts(), "stored": dict(counts.iter_rows())["kernel.stored"]}))
assert not {"esper", "ray", "torch"} & set(sys.modules), "Esper came in"
"""


@pytest.fixture(params=["directory", "s3"])
def storage(request, tmp_path):
    if request.param == "directory":
        return Storage.at(tmp_path / "store")
    return Storage.at("s3://bucket/read-by-others", request.getfixturevalue("s3_options"))


def test_polars_reads_kernels_blueprints_and_events(storage, tmp_path):
    hub = Hub.open(storage)
    one = compiled(hub, "one", tags=["small"])
    compiled(hub, "two", tags=["large"])
    compiled(hub, "three", tags=["small", "large"], target=WIDE, optimization_level=2)
    gone = compiled(hub, "gone", tags=["small"])
    hub.report(report_of(one))
    hub.mark_kernel(gone.kernel_id, KernelStatus.RETIRED, "replaced")
    hub.project(storage)
    options = storage.delta_options
    code = [sys.executable, "-I", "-c", WITH_POLARS, storage.uri, json.dumps(options)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    base = {"version": 1, "num_parameters": 72}
    assert found["stored"] == 4
    assert found["rows"] == [
        base | {"blueprint_name": "one", "signature": "vector-8-float32-cpu", "performance": 1.0, "fossilized": 1},
        base | {"blueprint_name": "three", "signature": "vector-16-float32-cpu", "performance": None, "fossilized": 0},
    ]
