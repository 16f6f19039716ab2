"""One rank of a run over gloo: `python rank_script.py WHAT RANK WORLD folder`. What it saw lies in folder/RANK.pt."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import safetensors.torch
import torch
from tolaria_support import BLUEPRINT, KEY, SIGNATURE, config, kernel_hub, train, workload
from torch import distributed, nn

from esper.api import fork_local, local_hub
from esper.config import CnnHost, GptHost, Host, MlpHost, ResNetHost, VitHost, parse_config
from esper.hosts import build_host
from esper.kasmina.layer import all_layers
from esper.kasmina.seed import Seed
from esper.kasmina.sites import find_sites
from esper.leyline import ConfigError, NonFiniteError, SeedStage
from esper.tolaria.numerics import digests
from esper.tolaria.ranks import SoloRanks, TorchRanks
from esper.tolaria.schedules import optimizer_factory
from esper.tolaria.task import TASKS
from esper.tolaria.trials_here import TrialsHere
from esper.tolaria.workload import Workload

HOSTS: dict[str, tuple[Host, tuple[int, ...], str, str]] = {
    "mlp": (MlpHost(hidden=(8, 8)), (8,), "blocks.1", "mlp_2x"),
    "cnn": (CnnHost(channels=(4, 4), dropout=0.1), (1, 8, 8), "stages.1.0", "conv_small"),
    "resnet": (ResNetHost(channels=(4, 4)), (1, 8, 8), "stages.1.0", "conv_small"),
    "vit": (VitHost(width=8, depth=1, heads=2, patch=4), (1, 8, 8), "blocks.0", "mlp_adapter"),
    "gpt": (GptHost(width=8, depth=1, heads=2, dropout=0.1), (6,), "blocks.0", "mlp_adapter"),
    "tied": (GptHost(width=8, depth=1, heads=2, tied=True), (6,), "blocks.0", "low_rank_adapter"),
}


SETTINGS: dict[str, dict[str, object]] = {
    "mlp, bf16 in parts": {"tolaria__precision": "bf16", "tolaria__accumulate": 2},
    "gpt, bf16 in parts": {"tolaria__precision": "bf16", "tolaria__accumulate": 2},
}
"""What else is told of a run of HOSTS; its name up to the comma is that of its host."""
PLAIN: dict[str, tuple[Host, tuple[int, ...], str, str]] = {
    "vit": (VitHost(width=8, depth=1, heads=2, patch=4, dropout=0.0), (1, 8, 8), "blocks.0", "mlp_adapter"),
    "gpt": (GptHost(width=8, depth=1, heads=2, dropout=0.0), (6,), "blocks.0", "mlp_adapter"),
}
"""Hosts in which a batch's samples do not meet, and nothing is drawn."""


class Saved:
    """Keeps the weights of one step."""

    def __init__(self, module: nn.Module, step: int) -> None:
        self.module, self.step, self.weights = module, step, {}

    def at(self, place: str, step: int) -> None:
        if (place, step) == ("step", self.step):
            self.weights = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


class Hub:
    """The hub of one rank, with something wrong with what it fetches."""

    def __init__(self, inner, fetch) -> None:
        self._inner, self.fetch = inner, fetch

    def __getattr__(self, name):
        return getattr(self._inner, name)


class Sabotage:
    """Lets the kernel of one rank fail, once: its module raises, or what autograd makes of its output does.

    Args:
        module: the host.
        stage: of the seed.
        where: `forward` or `backward` of a training step, `telemetry` (a step that is sampled), or `eval`.
    """

    def __init__(self, module: nn.Module, stage: SeedStage, where: str) -> None:
        [self.layer] = all_layers(module.get_submodule("_esper"))
        self.stage, self.where, self.fired, self.hooked = stage, where, 0, False

    def at(self, place: str, step: int) -> None:
        seed = self.layer.seeds[0]
        if place == "step" and not self.hooked and seed.stage is self.stage:
            self.layer.kernel(seed).register_forward_hook(self.fail)
            self.hooked = True

    def fail(self, kernel: nn.Module, args: tuple, y: torch.Tensor) -> None:
        due = {"telemetry": self.layer.observing, "eval": not kernel.training}.get(self.where, kernel.training)
        if self.fired or not due:
            return
        if self.where == "backward":
            y.register_hook(self.raised)
        else:
            self.raised()

    def raised(self, *_: object) -> None:
        self.fired += 1
        raise RuntimeError("sabotage")


class Tells:
    """Lets the patience with a kernel run out between two epochs, and leaves a file at the end of the next."""

    def __init__(self, path: Path, patience_s: float) -> None:
        self._path, self._patience_s = path, patience_s

    def at(self, place: str, step: int) -> None:
        if (place, step) == ("control", 1):
            threading.Event().wait(1.5 * self._patience_s)
        elif (place, step) == ("control", 2):
            self._path.touch()


def wait_for(path: Path) -> None:
    give_up = time.monotonic() + 120
    while not path.exists():
        if time.monotonic() > give_up:
            raise TimeoutError(path)
        threading.Event().wait(0.02)


def agreeing(rank: int, ranks, folder: Path) -> dict:
    """What several agreements come to; in the third, rank 1 says its word only after rank 0 has given up."""
    found = [
        ranks.agree(None, deadline_s=60),
        ranks.agree("my own reason" if rank == 1 else None, deadline_s=60),
    ]
    if rank == 1:
        wait_for(folder / "given-up")
    found.append(ranks.agree(None, deadline_s=0.5 if rank == 0 else 60))
    (folder / "given-up").touch()
    found.append(ranks.agree(None, deadline_s=60))
    return {"found": found}


def growing(rank: int, ranks, folder: Path, *, fetch=None, faults=None, **settings) -> dict:
    """A run of the support's problem; rank 1 fetches as it is told."""
    hub, key = kernel_hub()
    given = {"faults": faults} if faults is not None else {}
    if rank == 1 and fetch is not None:
        hub = Hub(hub, lambda kernel_id: fetch(kernel_hub()[0], kernel_id))
    chosen = config(deterministic=False, tolaria__epochs=3, **settings)
    summary, weights = train(folder / "run", chosen, ranks=ranks, hub=hub, public_key=key, **given)
    return {"weights": weights, "events": [event.model_dump(mode="json") for event in summary.events]}


def tampered(hub, kernel_id: str) -> bytes:
    content = bytearray(hub.fetch(kernel_id))
    content[len(content) // 2] ^= 1
    return bytes(content)


SABOTAGE = {
    "live forward": (SeedStage.GRAFTING, "forward"),
    "live telemetry": (SeedStage.STABILIZING, "telemetry"),
    "live validation": (SeedStage.STABILIZING, "eval"),
    "shadow forward": (SeedStage.TRAINING, "forward"),
    "shadow backward": (SeedStage.TRAINING, "backward"),
    "shadow validation": (SeedStage.TRAINING, "eval"),
}


def failing(rank: int, ranks, folder: Path) -> dict:
    """Runs in which the kernel of rank 1 alone fails at one place; the next place is another run."""
    found = {}
    for name, (stage, where) in SABOTAGE.items():
        problem = workload(config())
        faults = Late(problem.model, stage, where) if rank == 1 else None
        given = {} if faults is None else {"faults": faults}
        summary, weights = train(folder / name, config(), problem=problem, ranks=ranks, **given)
        events = [(event.step, event.to_stage.value, event.reason) for event in summary.events if not event.refused]
        backs = [(back.epoch, back.step, back.reason) for back in summary.rollbacks]
        fired = 0 if faults is None else faults.sabotage.fired
        found[name] = {"weights": weights, "events": events, "rollbacks": backs, "fired": fired}
    return found


class Late:
    """A sabotage of a host that is not wrapped yet."""

    def __init__(self, module: nn.Module, stage: SeedStage, where: str) -> None:
        self._prepare = lambda: Sabotage(module, stage, where)
        self.sabotage = None

    def at(self, place: str, step: int) -> None:
        self.sabotage = self.sabotage or self._prepare()
        self.sabotage.at(place, step)


class Astray:
    """Moves a weight of one rank alone, again and again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def at(self, place: str, step: int) -> None:
        if place == "step":
            with torch.no_grad():
                self.module[0].weight[0, 0] += 1e-3


def straying(rank: int, ranks, folder: Path) -> dict:
    """A run in which rank 1 computes other bits at every step."""
    problem = workload(config())
    given = {"faults": Astray(problem.model)} if rank == 1 else {}
    try:
        train(folder / "run", config(), problem=problem, ranks=ranks, **given)
    except NonFiniteError as error:
        return {"error": str(error)}
    return {"error": ""}


def racing(ranks, folder: Path) -> dict:
    """A race of two kernels, with the hashes of all tensors after each epoch."""
    from test_race_of_a_run import race

    chosen = race()
    problem = workload(chosen)
    hub, key = local_hub([SIGNATURE], chosen, private_key=KEY)
    seen: list[dict[str, str]] = []
    summary, weights = train(
        folder / "race", chosen, problem=problem, ranks=ranks, hub=hub, public_key=key,
        on_epoch=lambda record: seen.append(digests(problem.model.state_dict())),
    )  # fmt: skip
    events = [(event.step, event.seed, event.to_stage.value, event.reason) for event in summary.events]
    return {"digests": json.dumps(seen), "events": events, "weights": weights}


def plain(ranks, folder: Path) -> dict:
    """Twenty steps across a graft, on hosts in which a batch's samples do not meet."""
    found = {"layers": plain_layers(ranks, folder)}
    for name, host in PLAIN.items():
        # direct: whatever it would have shown behind the host. SGD: the loss does not depend on a key's bias, and Adam
        # makes whole steps of the rounding that is its gradient
        chosen, problem, given = problem_of(*host, strategy="direct", tolaria__optimizer__type="sgd")
        saved = Saved(problem.model, 20)
        summary, _ = train(
            folder / f"{name}-{ranks.world}", chosen, problem=problem, ranks=ranks, faults=saved, **given
        )
        graft = next(event.step for event in summary.events if event.to_stage is SeedStage.GRAFTING)
        found[name] = {"weights": saved.weights, "graft": graft}
    return found


def plain_layers(ranks, folder: Path) -> dict:
    torch.manual_seed(1)
    host = nn.Sequential(nn.Linear(8, 12), nn.Sequential(nn.Linear(12, 12), nn.ReLU()), nn.Linear(12, 3))
    site = {"kasmina__sites": "['1']", "tamiyo__schedule": f"[{{epoch: 0, site: '1', blueprint: {BLUEPRINT}}}]"}
    chosen = config(**site)
    problem = Workload(**{**vars(workload(chosen)), "model": host})
    saved = Saved(host, 20)
    summary, _ = train(folder / f"run-{ranks.world}", chosen, problem=problem, ranks=ranks, faults=saved)
    graft = next(event.step for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    return {"weights": saved.weights, "graft": graft}


class Half(nn.Module):
    """A host of which half is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.body = nn.Sequential(nn.Linear(12, 12), nn.ReLU())
        self.idle = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x)))


def unused(ranks, folder: Path) -> dict:
    """Twenty steps across a graft in a host with parameters that no step uses; without the setting, what is said."""
    site = {"kasmina__sites": "['body']", "tamiyo__schedule": f"[{{epoch: 0, site: body, blueprint: {BLUEPRINT}}}]"}
    chosen = config(**site)
    torch.manual_seed(1)
    host, words = Half(), ""
    problem = Workload(**{**vars(workload(chosen)), "model": host})
    saved = Saved(host, 20)
    looking = ranks if ranks.world == 1 else TorchRanks(find_unused=True)
    summary, _ = train(folder / f"run-{ranks.world}", chosen, problem=problem, ranks=looking, faults=saved)
    graft = next(event.step for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    if ranks.world > 1:
        try:
            train(folder / "strict", chosen, problem=Workload(**{**vars(problem), "model": Half()}), ranks=ranks)
        except ConfigError as error:
            words = str(error)
    return {"weights": saved.weights, "graft": graft, "words": words}


def problem_of(host_config: Host, shape: tuple[int, ...], site: str, blueprint: str, *, strategy="ramp", **settings):
    """The configuration of a run of one graft, its problem, and its hub with the signer's key."""
    is_text = isinstance(host_config, GptHost)
    host = build_host(host_config, input_shape=shape, num_outputs=11, seed=3)
    generator = torch.Generator().manual_seed(5)
    x = (
        torch.randint(11, (160, *shape), generator=generator)
        if is_text
        else torch.randn(160, *shape, generator=generator)
    )
    y = (x + 1) % 11 if is_text else x.flatten(1)[:, :11].argmax(1)
    graft = f"[{{epoch: 0, site: '{site}', blueprint: {blueprint}, strategy: {strategy}}}]"
    chosen = config(
        kasmina__sites=f"['{site}']", tamiyo__schedule=graft, tezzeret__blueprints=f"[{blueprint}]", **settings
    )
    problem = Workload(
        model=host, example=(x[:2],), train=(x[:120], y[:120]), val=(x[120:], y[120:]), scheduler=None,
        task=TASKS["language_model" if is_text else "classification"],
        optimizer=optimizer_factory(chosen.tolaria.optimizer),
    )  # fmt: skip
    hub, key = local_hub(find_sites(host, (x[:2],), sites=(site,), causal=is_text).values(), chosen, private_key=KEY)
    return chosen, problem, {"hub": hub, "public_key": key}


def epochs_of(name: str, ranks, folder: Path) -> dict:
    """Hashes of all tensors, seeds' too, after each epoch."""
    host = HOSTS[name.partition(",")[0]]
    chosen, problem, given = problem_of(*host, tolaria__epochs=6, **SETTINGS.get(name, {}))
    seen: list[dict[str, str]] = []
    summary, _ = train(
        folder / name, chosen, problem=problem, ranks=ranks, **given,
        on_epoch=lambda record: seen.append(digests(problem.model.state_dict())),
    )  # fmt: skip
    stages = [event.to_stage.value for event in summary.events if not event.refused]
    return {"digests": json.dumps(seen), "stages": stages}


def silent(rank: int, ranks, folder: Path) -> dict:
    """Rank 1 fetches its kernel only once the others have gone on without it."""

    def late(hub, kernel_id: str) -> bytes:
        wait_for(folder / "decided")
        return hub.fetch(kernel_id)

    patience_s = 2.0  # by which the ranks must also agree on the command, on a machine that others use
    tells = Tells(folder / "decided", patience_s) if rank == 0 else None
    return growing(rank, ranks, folder, fetch=late, faults=tells, tolaria__agree_s=patience_s)


def trying(rank: int, ranks, folder: Path) -> dict:
    """Rank 0 tries growth on forks; every rank keeps the weights with which its kernel begins to train."""
    tree = config(tolaria__epochs=10).model_dump(mode="json")
    tree |= {"deterministic": False}
    tree["tamiyo"] |= {
        "policy": "heuristic", "schedule": [], "warmup_epochs": 0, "plateau_window": 1, "plateau_threshold": 1000.0,
        "trials": {"enabled": True, "steps": 9, "flops_share": 1000.0, "z": 0.0},
    }  # fmt: skip
    chosen = parse_config(tree)
    hub, key = kernel_hub()
    won: list[bytes] = []

    def run(packed, fork):
        result = fork_local(lambda: workload(chosen), chosen, packed, fork, hub=hub, public_key=key)
        won.extend([result.weights] if result.weights else [])
        return result

    begun: list[dict[str, torch.Tensor]] = []
    begin = Seed.begin_training

    def watched(self, module, learning_rate):
        begun.append({name: tensor.detach().clone() for name, tensor in module.state_dict().items()})
        begin(self, module, learning_rate)

    Seed.begin_training = watched
    trials = TrialsHere(run) if rank == 0 else None
    summary, weights = train(folder / "trying", chosen, ranks=ranks, trials=trials)
    # the first that rank 0 sees is its fork's own
    own = begun[1] if rank == 0 else begun[0]
    forked = safetensors.torch.load(won[0]) if won else {}
    events = [(event.step, event.to_stage.value) for event in summary.events]
    return {"weights": weights, "begun": own, "forked": forked, "events": events}


def seen_by(what: str, rank: int, ranks, folder: Path) -> dict:
    scenes = {
        "agreeing": lambda: agreeing(rank, ranks, folder),
        "tampered": lambda: growing(rank, ranks, folder, fetch=tampered),
        "silent": lambda: silent(rank, ranks, folder),
        "failing": lambda: failing(rank, ranks, folder),
        "trying": lambda: trying(rank, ranks, folder),
        "straying": lambda: straying(rank, ranks, folder),
        "racing": lambda: racing(ranks, folder),
        "plain": lambda: plain(ranks, folder),
        "unused": lambda: unused(ranks, folder),
        "hosts": lambda: {name: epochs_of(name, ranks, folder) for name in (*HOSTS, *SETTINGS)},
    }
    return scenes[what]()


def main(what: str, rank: int, world: int, folder: Path) -> None:
    ranks = SoloRanks()
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
        ranks = TorchRanks()
    found = seen_by(what, rank, ranks, folder)
    torch.save(found, folder / f"{rank}-of-{world}.pt")
    if world > 1:
        distributed.barrier()
        os._exit(0)  # what is left of gloo's threads may abort a process whose interpreter ends


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
