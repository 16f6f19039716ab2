"""`esper export`: the grown model of a run as a file that loads without Esper: a program, or its weights alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from esper.config import parse_config
from esper.leyline import ConfigError
from jobs.environment import data_root
from jobs.runs import RunStore
from jobs.workload import ConfiguredWorkload


def export_run(name: str, storage: str, out: Path, *, fold: bool = False) -> dict[str, Any]:
    """Writes the run's last checkpoint; returns what was written.

    Args:
        name: of the run.
        storage: where runs lie.
        out: `.pt2` is a program with a dynamic batch; `.safetensors` is the plain `state_dict`, which `host.weights`
            of another run takes if the run did not grow.
        fold: puts fossils into the linear layers whose outputs they grow; `foldings` says which, and why not.

    Raises:
        ConfigError: if the run's model was handed over in Python, or the suffix is neither.
        NotFoundError: if there is no such run, or it left no checkpoint.
    """
    import torch

    from esper import kasmina
    from esper.api import checkpoint_host

    if out.suffix not in {".pt2", ".safetensors"}:
        raise ConfigError(f"cannot write {out.name}", field="--out", remedy="end it in .pt2 or .safetensors")
    store = RunStore(storage)
    run_id = store.resolve(name)
    config = parse_config(yaml.safe_load(store.config_text(run_id)))
    if config.host.type == "given":
        raise ConfigError(
            f"run {run_id} trains a model that was handed over in Python",
            field="run",
            remedy="call run.export() and torch.export.export in your script",
        )
    workload = ConfiguredWorkload(config, data_root())()
    host = checkpoint_host(workload, config, directory=store.directory(run_id))
    model, foldings = kasmina.export_folded(host) if fold else (kasmina.export(host), [])
    model.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        import safetensors.torch

        extra = [name for name, value in model.state_dict().items() if not isinstance(value, torch.Tensor)]
        if extra:
            raise ConfigError(f"{extra[0]} is no tensor: no safetensors", field="--out", remedy="end it in .pt2")
        safetensors.torch.save_model(model, str(out))  # which writes tied weights once
    else:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(
            model, workload.example, dynamic_shapes=tuple({0: batch} for _ in workload.example), strict=False
        )
        torch.export.save(program, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    written = {"run_id": run_id, "path": str(out), "bytes": out.stat().st_size, "parameters": parameters}
    return written | {"foldings": [asdict(folding) for folding in foldings]} if fold else written
