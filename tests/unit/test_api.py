"""The library's face: `grow`, `wrap` with one's own loop, `export`, and what `import esper` costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

import esper
from esper import api
from esper.api.wrapping import local_controller
from esper.config import parse_config
from esper.leyline import (
    BudgetState,
    ConfigError,
    EpochRecord,
    NotFoundError,
    PolicyCard,
    RunStatus,
    SeedStage,
    SiteError,
    SystemStatePacket,
)
from esper.storage import Storage
from esper.tamiyo.controller import LocalController
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.tolaria.task import resolve_task
from esper.urza.policies import StoredPolicies

GROW = (
    "deterministic=true",  # kernels are waited for, so that no epoch depends on the loader's pace
    "kasmina.evidence_z=0",
    "kasmina.min_training_epochs=1",
    "kasmina.harm_tolerance=5.0",
    "kasmina.shadow_lr=0.02",
    "tezzeret.blueprints=[mlp_2x]",
    "tamiyo.policy=schedule",
    "budget.params=20",
    "budget.flops=20",
)


def schedule(site: str) -> tuple[str, ...]:
    return (*GROW, f"tamiyo.schedule=[{{epoch: 0, site: '{site}', blueprint: mlp_2x}}]")


class Mlp(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
        self.head = nn.Linear(10, outputs)

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


def vectors(targets: str):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 6, generator=generator)
    y = x @ torch.randn(6, 3, generator=generator)
    return x, (y.argmax(dim=1) if targets == "classes" else y)


def text():
    generator = torch.Generator().manual_seed(3)
    x_bt = torch.randint(11, (120, 5), generator=generator)
    return x_bt, (x_bt + 1) % 11


def split(data):
    x, y = data
    return (x[:80], y[:80]), (x[80:], y[80:])


def in_this_process(workload_factory, config):
    """A runtime without Ray."""
    workload = workload_factory()
    run_id = api.new_run_id(config)
    directory = f"{config.storage}/runs/{run_id}"
    hub, key = api.local_hub(_sites(workload, config), config)
    summary = api.train_local(
        workload, config, directory=directory, run_id=run_id, hub=hub, bus=None,
        controller=LocalController(config.tamiyo, seed=config.seed), public_key=key,
    )  # fmt: skip
    return api.RunResult(run_id, directory, summary)


def _sites(workload, config):
    import copy

    causal = workload.task.name == "language_model"
    probe = esper.wrap(
        copy.deepcopy(workload.model), example=workload.example, sites=config.kasmina.sites, causal=causal
    )
    return probe.sites.values()


@pytest.mark.parametrize(
    ("task", "model", "data", "site"),
    [
        ("classification", Mlp, vectors("classes"), "body"),
        ("regression", Mlp, vectors("values"), "body"),
        ("language_model", CharModel, text(), "block"),
        (esper.Task(F.l1_loss, {"mae": F.l1_loss}, higher_is_better=False), Mlp, vectors("values"), "body"),
    ],
    ids=["classification", "regression", "language_model", "own"],
)
def test_grow_as_on_the_first_page(task, model, data, site, tmp_path, monkeypatch):
    monkeypatch.setattr("esper.api.growing.find_runtime", lambda: in_this_process)
    torch.manual_seed(0)
    mine = model()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    train, val = split(data)
    run = esper.grow(
        mine, train, val, task=task, optimizer=lambda ps: torch.optim.AdamW(ps, 1e-2), epochs=8, sites=site,
        batch_size=40, test_data=val, overrides=(*schedule(site), f"storage={tmp_path}"),
    )  # fmt: skip
    assert run.summary.status is RunStatus.FINISHED
    assert run.summary.events[-1].to_stage is SeedStage.FOSSILIZED
    assert {name: tensor.equal(before[name]) for name, tensor in mine.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert "mlp_2x" in run.table()
    with torch.no_grad():  # a model that was trained already shows what it was worth before the first step
        before_loss = resolve_task(task).loss_fn(mine.eval()(val[0]), val[1])
    assert run.summary.start is not None
    assert run.summary.start.val_loss == pytest.approx(before_loss.item(), rel=1e-5)
    assert "started at" in run.table()
    assert run.report().read_text().startswith("<!")
    plain = run.export()
    assert type(plain).__module__ != "esper"
    assert not any(name.startswith("_esper") for name, _ in plain.named_modules())
    x, y = val
    with torch.no_grad():
        loss = resolve_task(task).loss_fn(plain(x), y)
    assert loss.item() == pytest.approx(run.summary.metrics.test_loss, rel=1e-5)
    assert sum(p.numel() for p in plain.parameters()) == run.summary.params.final
    assert isinstance(run.export(best=True), nn.Module)


@pytest.mark.parametrize("known_length", [True, False])
def test_wrap_with_ones_own_loop(known_length):
    torch.manual_seed(0)
    (x, y), val = split(vectors("classes"))
    model = Mlp()
    grown = esper.wrap(model, example=(x[:2],), sites="body", overrides=GROW)
    assert list(grown.sites) == ["body"]
    assert torch.equal(grown(x), model(x))
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=33)
    with grown.session(
        optimizer=optimizer, scheduler=scheduler, task="classification", val_data=val, epochs=8,
        steps_per_epoch=4 if known_length else 0, overrides=schedule("body"),
    ) as s:  # fmt: skip
        for _ in range(8):
            for i in range(0, 80, 20):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[i : i + 20]), y[i : i + 20])
                loss.backward()
                optimizer.step()
                scheduler.step()
                s.step((x[i : i + 20], y[i : i + 20]), loss)
            record = s.end_epoch({"train_metric": 0.5})
            assert record.train_metric == 0.5
        assert s.summary().events[-1].to_stage is SeedStage.FOSSILIZED
    assert len(optimizer.param_groups) == 2
    model.eval()
    assert torch.equal(grown.export()(x), model(x))
    assert torch.equal(esper.export(grown)(x), model(x))


def test_a_session_decides_by_the_learned_policy_that_its_storage_had_promoted_when_it_began(tmp_path):
    chosen = parse_config({"storage": str(tmp_path), "tamiyo": {"policy": "gnn"}})
    with pytest.raises(NotFoundError, match="promote"):
        local_controller(chosen)
    store = StoredPolicies(Storage.at(str(tmp_path)))
    shape = NetShape(hidden=8, heads=2, members=2)
    versions = []
    for seed in range(2):
        weights = PolicyNet(shape, seed=seed).to_bytes()
        form = {"shape": shape.model_dump(), "observation_version": OBSERVATION_VERSION}
        versions.append(store.put(PolicyCard.of(weights, name="one", **form), weights))
    store.promote(versions[0])
    controller = local_controller(chosen)
    store.promote(versions[1])
    epoch = EpochRecord(run_id="run", epoch=0, num_epochs=2, step=1, train_loss=1.0)
    seen = SystemStatePacket(run_id="run", epoch=epoch, layers=(), budget=BudgetState(params_used=1, flops_used=1))
    _, signal = controller.decide({}, seen)
    assert signal.explanation.version == versions[0]
    assert signal.commands == ()


def test_a_session_is_left_by_an_error_as_it_is():
    (x, _), val = split(vectors("classes"))
    grown = esper.wrap(Mlp(), example=(x[:2],), sites="body", overrides=GROW)
    with (
        pytest.raises(ZeroDivisionError),
        grown.session(optimizer=torch.optim.SGD(grown.parameters(), lr=0.1), val_data=val),
    ):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: esper.wrap(Mlp(), example=(torch.zeros(2, 6),), sites="nowhere"), "nowhere"),
        (lambda: esper.wrap(Mlp(), example=(torch.zeros(2, 6),), overrides=["kasmina.speed=1"]), "speed"),
        (
            lambda: esper.wrap(Mlp(), example=(torch.zeros(2, 6),), overrides=["tolaria.clip_norm=2"]),
            "clip in your loop",
        ),
        (
            lambda: esper.wrap(Mlp(), example=(torch.zeros(2, 6),), overrides=["tolaria.optimizer.lr=2"]),
            "tolaria.optimizer.lr",
        ),
        (lambda: esper.grow(Mlp(), *split(vectors("classes")), task="classify"), "classify"),
        (lambda: esper.grow(Mlp(), *split(vectors("classes")), epochs=0), "tolaria.epochs"),
    ],
)
def test_wrong_settings_name_the_field(call, words):
    with pytest.raises((ConfigError, SiteError), match=words):
        call()


def test_a_blueprint_that_the_library_lacks_is_named():
    config = esper.RunConfig().model_copy(update={"tezzeret": esper.RunConfig().tezzeret.model_copy(
        update={"blueprints": ("no_such",)})})  # fmt: skip
    with pytest.raises(ConfigError, match="no_such"):
        api.local_hub([], config)


def test_without_a_runtime_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("esper.api.runtime.entry_points", lambda **_: EntryPoints())
    with pytest.raises(ConfigError, match="no runtime is installed"):
        api.find_runtime()
    broken = EntryPoint("ray", "no_such_package.launch:run", api.RUNTIME_GROUP)
    monkeypatch.setattr("esper.api.runtime.entry_points", lambda **_: EntryPoints([broken]))
    with pytest.raises(ConfigError, match=r"no_such_package\.launch:run does not load"):
        api.find_runtime()


def test_importing_esper_imports_neither_torch_nor_ray():
    script = (
        "import sys, esper; esper.Budget, esper.RunConfig, esper.load_config; dir(esper)\n"
        "found = {'torch', 'ray', 'numpy', 'deltalake'} & set(sys.modules)\n"
        "assert not found, found\n"
        "try: esper.nothing\n"
        "except AttributeError: print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "ok\n", done.stderr


def own_loop(grown, optimizer, overrides, *, epochs, sick=()):
    """A loop of one's own over whole epochs; at the steps `sick` its loss is told to be NaN."""
    (x, y), val = split(vectors("classes"))
    with grown.session(optimizer=optimizer, val_data=val, epochs=epochs, overrides=overrides) as s:
        for step in range(4 * epochs):
            part = slice(20 * (step % 4), 20 * (step % 4) + 20)
            optimizer.zero_grad()
            loss = F.cross_entropy(grown(x[part]), y[part])
            loss.backward()
            optimizer.step()
            s.step((x[part], y[part]), float("nan") if step in sick else loss)
            if step % 4 == 3:
                s.end_epoch({})
        return s


def wrapped(**kwargs):
    torch.manual_seed(0)
    return esper.wrap(Mlp(), example=(torch.zeros(2, 6),), sites="body", **kwargs)


def test_the_overrides_of_a_session_are_those_of_its_kernels():
    grown = wrapped()
    s = own_loop(grown, torch.optim.SGD(grown.parameters(), lr=0.1), schedule("body"), epochs=8)
    assert s.summary().events[-1].to_stage is SeedStage.FOSSILIZED  # by the gates of GROW, which wrap() did not hear


@pytest.mark.parametrize("setting", ["kasmina.race=2", "kasmina.chunks=3", "kasmina.sites=[head]"])
def test_what_wrap_has_settled_is_refused_later(setting):
    grown = wrapped()
    with (
        pytest.raises(ConfigError, match="settled when the model was wrapped"),
        grown.session(
            optimizer=torch.optim.SGD(grown.parameters(), lr=0.1), val_data=vectors("classes"), overrides=[setting]
        ),
    ):
        pass


def test_wrap_hears_which_sites_are_set():
    model, example = Mlp(), (torch.zeros(2, 6),)
    assert list(esper.wrap(model, example=example, overrides=["kasmina.sites=[body.0]"]).sites) == ["body.0"]
    with pytest.raises(SiteError, match="nowhere"):
        esper.wrap(Mlp(), example=example, overrides=["kasmina.sites=[nowhere]"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (schedule("elsewhere"), "no site 'elsewhere'"),
        (("tamiyo.ask_before_graft=true",), "nobody finds a loop of your own"),
        (("tolaria.num_threads=2",), "torch.set_num_threads"),
        (("nissa.view=plain",), "hand your bus"),
        (("tamiyo.control=listen",), "hand your controller"),
    ],
)
def test_a_session_refuses_what_would_change_nothing(overrides, words):
    grown = wrapped()
    with (
        pytest.raises(ConfigError, match=words),
        grown.session(
            optimizer=torch.optim.SGD(grown.parameters(), lr=0.1), val_data=vectors("classes"), overrides=overrides
        ),
    ):
        pass


@pytest.mark.parametrize(
    ("setting", "arguments"),
    [
        ("tolaria.optimizer.lr=0.5", {"optimizer": torch.optim.SGD}),
        ("tolaria.scheduler.type=cosine", {"scheduler": lambda optimizer, _: optimizer}),
        ("task=regression", {}),
        ("data.type=digits", {}),
    ],
)
def test_grow_refuses_settings_of_what_it_is_handed(setting, arguments):
    with pytest.raises(ConfigError, match="handed over") as refused:
        esper.grow(Mlp(), *split(vectors("classes")), overrides=[setting], **arguments)
    assert refused.value.field == setting.partition("=")[0]


def test_kernels_join_an_optimizer_that_knows_names():
    grown = wrapped(overrides=GROW)
    optimizer = torch.optim.AdamW(list(grown.module.named_parameters()), 1e-2)
    own_loop(grown, optimizer, schedule("body"), epochs=4)
    assert optimizer.param_groups[1]["param_names"][0].startswith("_esper.body.s0.")


@pytest.mark.parametrize("anew", [False, True])
def test_a_second_session_of_a_model_that_is_growing_can_go_back(anew):
    grown = wrapped()
    optimizer = torch.optim.AdamW(grown.parameters(), 1e-2)
    own_loop(grown, optimizer, (*schedule("body"), "kasmina.stabilize_epochs=9"), epochs=4)
    assert grown.seeds()[0].stage is SeedStage.STABILIZING
    if anew:
        optimizer = torch.optim.AdamW(grown.parameters(), 1e-2)
    # it is blamed at first and retires; when the loss is bad again it is gone, and was there in the last good state
    s = own_loop(grown, optimizer, (*GROW, "tamiyo.policy=none"), epochs=4, sick=(5, 11))
    assert [rollback.step for rollback in s.summary().rollbacks] == [6, 12]
    assert grown.seeds()[0].stage is SeedStage.CULLED
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in grown.parameters()}


def test_a_loop_of_ones_own_among_several_processes_is_refused():
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    grown = wrapped()
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ConfigError, match="one of 2 processes"):
            own_loop(grown, torch.optim.SGD(grown.parameters(), lr=0.1), GROW, epochs=1)
    finally:
        distributed.destroy_process_group()


def test_a_lazy_module_must_have_run_before():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.LazyLinear(10), nn.LazyLinear(3)

        def forward(self, x):
            return self.head(F.relu(self.body(x)))

    x, model = torch.zeros(2, 6), Lazy()
    with pytest.raises(SiteError, match="lazy"):
        esper.wrap(model, example=(x,))
    model(x)
    assert list(esper.wrap(model, example=(x,)).sites) == ["body"]
