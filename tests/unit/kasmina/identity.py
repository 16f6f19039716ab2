"""Hosts of every kind, and a small training loop whose every trace is kept: weights, buffers, gradients, optimizer,
random numbers and the order of samples. With seeds in TRAINING and without, the traces must be the same.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from kasmina_support import PUBLIC, Shelf, class_loss, order
from torch import nn

from esper.config import CnnHost, GptHost, KasminaConfig, MlpHost, ResNetHost, VitHost
from esper.hosts import build_host
from esper.kasmina import wrap
from esper.leyline import Action, SeedStage, SiteKind

IMAGE, TOKENS = (1, 8, 8), (6,)
KINDS = {
    "mlp": (MlpHost(hidden=(8, 8, 8)), IMAGE),
    "cnn": (CnnHost(channels=(4,), blocks_per_stage=3, dropout=0.3), IMAGE),
    "resnet": (ResNetHost(channels=(4, 6)), IMAGE),
    "vit": (VitHost(patch=4, width=8, depth=2, heads=2, dropout=0.2), IMAGE),
    "gpt": (GptHost(width=8, depth=3, heads=2, dropout=0.2, tied=True), TOKENS),
}
DESIGNS = {SiteKind.VECTOR: "mlp_adapter", SiteKind.SEQUENCE: "mlp_adapter", SiteKind.FEATURE_MAP: "residual_conv"}


def build_kind(kind):
    config, shape = KINDS[kind]
    return build_host(config, input_shape=shape, num_outputs=7, seed=0)


def samples(kind, num):
    generator = torch.Generator().manual_seed(5)
    _, shape = KINDS[kind]
    if shape is TOKENS:
        x = torch.randint(7, (num, *shape), generator=generator)
        return x, x
    return torch.randn(num, *shape, generator=generator), torch.randint(7, (num,), generator=generator)


def with_seeds(model, kind, num_seeds, *, race=1):
    """Wraps the model and puts so many seeds in TRAINING, `race` of them at each site."""
    x, _ = samples(kind, 2)
    host = wrap(model, example=(x,), causal=kind == "gpt", config=KasminaConfig(race=race))
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    views = host.seeds()[:num_seeds]
    assert len(views) == num_seeds, f"{kind} has {len(views)} sites only"
    for view in views:
        kernel_id = shelf.put(DESIGNS[view.signature.kind], view.signature, seed=int(view.seed_id[1:]))
        for action in (Action.GERMINATE, Action.ADVANCE):
            host.apply(order(action, view.site, view.seed_id, kernel_id=kernel_id), run_id="r", epoch=0, step=0)
    assert sum(v.stage is SeedStage.TRAINING for v in host.seeds()) == num_seeds
    return host


def trace(kind, num_seeds, *, steps, race=1, rank=0, parallel=None, mean=None, seeds=None, replays=0):
    """Trains for some steps and tells everything of the host, by name.

    Args:
        kind: of host.
        num_seeds: in TRAINING behind it; None leaves the model without Esper.
        steps: of optimizer, each with 4 samples.
        race: how many of the seeds stand at one site.
        rank: which ones of the shuffled samples are taken.
        parallel: wraps the model for several processes.
        mean: averages tensors over them.
        seeds: takes the tensors of the seeds at the end.
        replays: 1 lets kernels train from their sites on, by the tails that the hosts have.
    """
    model = build_kind(kind)
    host = None if num_seeds is None else with_seeds(model, kind, num_seeds, race=race)
    seeds_before = seed_tensors(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    live = model if parallel is None else parallel(model)
    inputs, targets = samples(kind, 32)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    taken = []
    for step in range(steps):
        if host is not None:
            host.prepare(step, epoch=0, steps_per_epoch=steps, observe=step % 3 == 0, replays=replays)
        chosen = torch.randperm(32)[rank * 4 : rank * 4 + 4]
        taken.append(chosen)
        x, y = inputs[chosen], targets[chosen]
        optimizer.zero_grad()
        class_loss(live(x), y).backward()
        optimizer.step()
        if host is not None:
            host.train_shadows((x,), lambda out, y=y: class_loss(out, y), all_reduce=mean)
    seeds_after = seed_tensors(model)
    assert all(not torch.equal(seeds_before[key], seeds_after[key]) for key in seeds_after if "weight" in key)
    if seeds is not None:
        seeds.update(seeds_after)
    found = {k: t.clone() for k, t in model.state_dict().items() if not k.startswith("_esper.")}
    found |= {f"grad {k}": p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {k}": t.clone() for k, t in state.items()}
    found |= {"samples": torch.stack(taken), "rng": torch.get_rng_state()}
    found["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002 - hosts may use it
    found["python"] = torch.tensor(random.getstate()[1])
    return found


def seed_tensors(model: nn.Module):
    return {k: t.clone() for k, t in model.state_dict().items() if k.startswith("_esper.")}
