"""Starting from a trained plain model: what is read, what is refused, and that nothing is lost at the start."""

from __future__ import annotations

import copy
from dataclasses import replace

import fsspec
import pytest
import safetensors.torch
import torch
from tolaria_support import Crash, CrashAt, config, model, train, workload

from esper import kasmina
from esper.config import CnnHost, GptHost, ImportedHost, MlpHost
from esper.hosts import build_host
from esper.leyline import ConfigError, RunHistory
from esper.tolaria.evidence import evaluate
from esper.tolaria.ranks import SoloRanks
from esper.tolaria.weights import Trained, read_weights
from esper.tolaria.workload import evaluation_batches

HOSTS = {
    "mlp": (MlpHost(), (64,)),
    "cnn": (CnnHost(), (1, 8, 8)),
    "gpt": (GptHost(width=8, depth=1, heads=2), (6,)),
    "tied gpt": (GptHost(width=8, depth=1, heads=2, tied=True), (6,)),
    "import": (ImportedHost(target="torch.nn:Linear", args={"in_features": 3, "out_features": 2}), (3,)),
}


def build(name, seed):
    chosen, shape = HOSTS[name]
    return build_host(chosen, input_shape=shape, num_outputs=10, seed=seed)


def save(module, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_model(module, str(path))
    else:
        torch.save(module.state_dict(), path)
    return str(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("name", HOSTS)
def test_every_host_takes_its_weights_from_either_form(tmp_path, name, suffix):
    trained, fresh = build(name, 1), build(name, 2)
    assert not same(trained.state_dict(), fresh.state_dict())
    Trained(save(trained, tmp_path / f"host.{suffix}")).load_into(fresh)
    assert same(trained.state_dict(), fresh.state_dict())


def test_any_fsspec_address_will_do():
    trained, fresh = build("mlp", 1), build("mlp", 2)
    with fsspec.open("memory://trained/host.safetensors", "wb") as file:
        file.write(safetensors.torch.save(trained.state_dict()))
    Trained("memory://trained/host.safetensors").load_into(fresh)
    assert same(trained.state_dict(), fresh.state_dict())


def altered(name):
    state = dict(model().state_dict())
    match name:
        case "missing":
            del state["4.bias"]
        case "unexpected":
            state["5.weight"] = torch.zeros(1)
        case "mis-shaped":
            state["4.weight"] = torch.zeros(3, 13)
        case "not finite":
            state["4.weight"] = torch.full((3, 12), torch.nan)
        case "integers":
            state["4.weight"] = torch.zeros(3, 12, dtype=torch.int64)
        case "parallel":
            state = {f"module.{key}": tensor for key, tensor in state.items()}
        case "compiled":
            state = {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
        case "grown":
            state["3.grown.s0.up.weight"] = torch.zeros(1)
    return state


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", r"is not of this host: it lacks 4\.bias \("),
        ("unexpected", r"the host has no 5\.weight"),
        ("mis-shaped", r"4\.weight is \(3, 13\), not \(3, 12\)"),
        ("not finite", r"4\.weight holds values that are not finite"),
        ("integers", r"4\.weight is torch\.int64, the host's is torch\.float32"),
        ("parallel", "saved through DataParallel or DistributedDataParallel: save the state_dict of the model inside"),
        ("compiled", "saved through torch.compile"),
        ("grown", "of a model that has grown"),
    ],
)
def test_what_is_not_this_host_is_refused_and_changes_nothing(tmp_path, what, words):
    path = tmp_path / "host.safetensors"
    safetensors.torch.save_file(altered(what), path)
    host = model(2)
    before = copy.deepcopy(host.state_dict())
    with pytest.raises(ConfigError, match=rf"host\.weights: .*{words}"):
        Trained(str(path)).load_into(host)
    assert same(before, host.state_dict())


class Noted(torch.nn.Linear):
    note = "fresh"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_extra_state_is_taken_from_a_file_that_has_it(tmp_path):
    trained, fresh, other = Noted(3, 2), Noted(3, 2), Noted(3, 2)
    trained.note = "trained"
    Trained(save(trained, tmp_path / "host.pt")).load_into(fresh)
    assert (fresh.note, torch.equal(fresh.weight, trained.weight)) == ("trained", True)
    tensors = {"weight": trained.weight.detach(), "bias": trained.bias.detach()}
    safetensors.torch.save_file(tensors, tmp_path / "host.safetensors")
    Trained(str(tmp_path / "host.safetensors")).load_into(other)
    assert (other.note, torch.equal(other.weight, trained.weight)) == ("fresh", True)


def with_buffers(scale):
    host = model()
    host.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    host.register_buffer("waves", scale * torch.polar(torch.ones(4), torch.arange(4.0)))
    return host


def test_infinities_where_the_host_has_them_and_complex_numbers_are_taken(tmp_path):
    trained, fresh = with_buffers(1.0), with_buffers(2.0)
    Trained(save(trained, tmp_path / "host.safetensors")).load_into(fresh)
    assert same(trained.state_dict(), fresh.state_dict())
    trained.mask[3, 0] = torch.inf
    with pytest.raises(ConfigError, match="mask holds values that are not finite"):
        Trained(save(trained, tmp_path / "other.pt")).load_into(fresh)


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "state_dict": {}}, r"is no state_dict: it holds epoch, state_dict \(save model\.state_dict\(\)"),
        ([1, 2], "it holds a list"),
        ({"weight": Code()}, "holds no weights that can be read safely"),
    ],
)
def test_other_contents_of_a_torch_file_are_refused_and_not_run(tmp_path, capsys, content, words):
    torch.save(content, tmp_path / "host.pt")
    with pytest.raises(ConfigError, match=words):
        read_weights(str(tmp_path / "host.pt"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x02\0\0\0\0\0\0\0{}garbage"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "host").write_bytes(content)
    with pytest.raises(ConfigError, match="no weights that can be read"):
        read_weights(str(tmp_path / "host"))


@pytest.mark.parametrize("address", ["nowhere.safetensors", "memory://nowhere/host.pt", "nosuchscheme://x/y"])
def test_an_address_without_a_file_is_named(address):
    with pytest.raises(ConfigError, match=rf"cannot read {address}.*esper export"):
        read_weights(address)


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path):
    trained = build("tied gpt", 1)
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    state["head.weight"] += 1
    safetensors.torch.save_file(state, tmp_path / "host.safetensors")
    with pytest.raises(ConfigError, match="tied in this host, and differ there"):
        Trained(str(tmp_path / "host.safetensors")).load_into(build("tied gpt", 2))


def plain_loss(module):
    """Of the plain module, which was never wrapped."""
    problem = workload(config())
    batches = evaluation_batches(problem.val, batch_size=40).epoch(0, rank=0, world=1)
    return evaluate(module, batches, problem.task, ranks=SoloRanks(), device=torch.device("cpu"))


def test_an_upgrade_begins_exactly_where_the_plain_model_ended(tmp_path):
    _, before = train(tmp_path / "small", config(tamiyo__policy="none", tolaria__epochs=3))
    safetensors.torch.save_file(before, tmp_path / "small.safetensors")
    trained = model(5)
    trained.load_state_dict(before)
    expected = plain_loss(trained)

    chosen = config(tolaria__epochs=5)
    problem = replace(workload(chosen), model=model(9), trained=Trained(str(tmp_path / "small.safetensors")))
    summary, _ = train(tmp_path / "big", chosen, problem=problem)

    assert summary.start is not None
    assert (summary.start.val_loss, summary.start.val_metric) == (expected.loss, expected.metrics["accuracy"])
    assert summary.start.weights == str(tmp_path / "small.safetensors")
    history = RunHistory.model_validate_json((tmp_path / "big" / "history.json").read_bytes())
    assert history.start == summary.start
    assert summary.params.final > summary.params.start  # and it grew


def test_a_resumed_upgrade_needs_its_first_weights_no_more(tmp_path):
    path = save(model(4), tmp_path / "host.pt")
    chosen = config(tolaria__epochs=3)

    def problem():
        return replace(workload(chosen), trained=Trained(path))

    whole, weights = train(tmp_path / "whole", chosen, problem=problem())
    fault = CrashAt("checkpoint", 1)
    with pytest.raises(Crash):
        train(tmp_path / "torn", chosen, problem=problem(), faults=fault)
    (tmp_path / "host.pt").unlink()
    resumed, again = train(tmp_path / "torn", chosen, problem=problem(), resume=True)
    assert fault.fired
    assert same(weights, again)
    assert resumed.start == whole.start is not None


def test_a_model_that_was_handed_over_trained_is_measured_as_it_is(tmp_path):
    trained = model(6)
    expected = plain_loss(copy.deepcopy(trained)).loss
    chosen = config(tolaria__epochs=1)
    summary, _ = train(tmp_path, chosen, problem=replace(workload(chosen), model=trained, trained=Trained()))
    assert summary.start is not None
    assert summary.start.val_loss == expected
    assert summary.start.weights == ""


def test_wrapping_does_not_hide_the_hosts_own_keys():
    host = model(2)
    x = torch.randn(4, 8)
    kasmina.wrap(host, example=(x,), sites=["3"])
    path = fsspec.filesystem("memory")
    path.pipe_file("/wrapped.safetensors", safetensors.torch.save(model(3).state_dict()))
    Trained("memory://wrapped.safetensors").load_into(host)
    assert torch.equal(host.eval()(x), model(3).eval()(x))
