"""DESIGN's first page as written, on Ray: one's own model, data, loss and optimizer in, a plain grown model out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

import esper
from actors.cluster import connected, prepare_environment
from esper.config import DigitsData
from esper.data.digits import load_digits
from esper.leyline import RunStatus, SeedStage, SiteError

prepare_environment()

from actors import platform  # noqa: E402 - imports Ray, whose environment comes first

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One Ray and one platform for the module; `esper.grow` joins a Ray that is there."""
    storage = tmp_path_factory.mktemp("grow")
    with connected(dashboard=False):
        yield (f"storage={storage}", f"tezzeret.key_file={storage}/key.pem", "nissa.view=quiet")
        platform.down(str(storage))


class MyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.mid(self.body(x)))


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.body(x))


class CharModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, x_bt):
        return self.head(F.relu(self.block(self.embed(x_bt))))


def scheduled(site):
    """One graft by schedule whose gates are wide open: what is tested is the way, not the policy."""
    return (
        "deterministic=true",
        "kasmina.evidence_z=0",
        "kasmina.min_training_epochs=1",
        "kasmina.harm_tolerance=5.0",
        "kasmina.shadow_lr=0.02",
        "tezzeret.blueprints=[mlp_2x]",
        "tamiyo.policy=schedule",
        f"tamiyo.schedule=[{{epoch: 0, site: {site}, blueprint: mlp_2x}}]",
        "budget.params=20",
        "budget.flops=20",
    )


def test_as_on_the_first_page(settings):
    data = load_digits(DigitsData(layout="flat"))
    torch.manual_seed(0)
    model = MyNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = esper.grow(
        model, data.train, data.val,
        task="classification",
        optimizer=lambda ps: torch.optim.AdamW(ps, 1e-3),
        epochs=4, sites="auto", budget=esper.Budget(params=2.0, flops=1.5),
        test_data=data.test, overrides=settings,
    )  # fmt: skip
    assert run.summary.status is RunStatus.FINISHED
    assert (run.summary.num_epochs, run.config.budget) == (4, esper.Budget(params=2.0, flops=1.5))
    assert run.summary.run_id in run.table()
    assert run.report().read_text().startswith("<!")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = run.export()
    assert plain.state_dict().keys() == before.keys()
    assert not torch.equal(plain.head.weight, model.head.weight)
    x, y = data.test
    with torch.no_grad():
        accuracy = (plain(x).argmax(dim=1) == y).float().mean().item()
    assert accuracy == pytest.approx(run.summary.metrics.test_accuracy)


def own_loss():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 6, generator=generator)
    task = esper.Task(F.smooth_l1_loss, {"mae": F.l1_loss}, higher_is_better=False)
    return task, Line, (x, x @ torch.randn(6, 3, generator=generator)), "body"


def language():
    generator = torch.Generator().manual_seed(3)
    x_bt = torch.randint(11, (120, 5), generator=generator)
    return "language_model", CharModel, (x_bt, (x_bt + 1) % 11), "block"


@pytest.mark.parametrize("problem", [own_loss, language])
def test_other_tasks_grow_to_a_fossil(problem, settings):
    task, model, (x, y), site = problem()
    torch.manual_seed(0)
    run = esper.grow(
        model(), (x[:80], y[:80]), (x[80:], y[80:]), task=task, optimizer=lambda ps: torch.optim.SGD(ps, 0.05),
        epochs=8, sites=site, batch_size=40, test_data=(x[80:], y[80:]), overrides=(*settings, *scheduled(site)),
    )  # fmt: skip
    assert run.summary.events[-1].to_stage is SeedStage.FOSSILIZED
    plain = esper.export(run)
    assert sum(p.numel() for p in plain.parameters()) == run.summary.params.final > run.summary.params.start
    assert not any(type(module).__module__.startswith("esper") for module in plain.modules())
    loss = task.loss_fn if isinstance(task, esper.Task) else lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten())
    with torch.no_grad():
        assert loss(plain(x[80:]), y[80:]).item() == pytest.approx(run.summary.metrics.test_loss, rel=1e-5)


def test_a_wrong_site_is_refused_before_anything_is_written(settings, tmp_path):
    x, y = torch.zeros(8, 6), torch.zeros(8, 3)
    with pytest.raises(SiteError, match=r"kasmina\.sites"):
        esper.grow(
            Line(), (x, y), (x, y), task="regression", sites="nowhere",
            overrides=(*settings, f"storage={tmp_path}/store"),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


RAY_FIRST = """
import ray
from actors.cluster import connected
with connected(dashboard=False) as cluster:
    print(cluster.owned, ray.get(ray.remote(lambda: 7).remote()))
"""


def test_a_script_may_import_ray_before(settings):
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RAY_FIRST], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.stdout == "True 7\n", done.stderr[-2000:]
