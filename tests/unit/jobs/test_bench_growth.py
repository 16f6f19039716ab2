import torch

from esper.config import load_config
from esper.data import load_data
from esper.hosts import build_host
from jobs.bench.arms import ARMS, Cell, small, stopped_epochs, with_parts
from jobs.bench.growth import _Study, compare
from jobs.environment import REPOSITORY


def cell(arm, accuracy, *, seed=0, flops=100, epochs=10, settings="x", fossils=0):
    return Cell(
        host="cnn",
        arm=arm,
        seed=seed,
        settings=settings,
        test_accuracy=accuracy,
        val_accuracy=0.5,
        epochs=epochs,
        params=10,
        flops=flops,
        seconds=1.0,
        fossils=fossils,
    )


def study(none, grow, static, stopped):
    figures = {"none": none, "grow": grow, "static": static, "stopped": stopped}
    return [
        {arm: cell(arm, figures[arm][seed], seed=seed, flops=50 if arm == "grow" else 100, fossils=1) for arm in ARMS}
        for seed in range(len(grow))
    ]


def test_growing_that_beats_not_growing_meets_the_goal_and_the_verdict_hides_nothing():
    goal, verdict = compare("cnn", study([0.5, 0.5, 0.52], [0.7, 0.71, 0.72], [0.8, 0.81, 0.82], [0.7, 0.72, 0.71]))
    assert goal.met
    assert goal.value > 0.19
    assert "3 seeds, 3 fossils: growing reaches 71.0%, not growing 50.7%" in verdict
    assert "is worse (-10.0 points" in verdict
    assert "for 0.50 of the FLOPs" in verdict
    assert "is not distinguishable from them" in verdict


def test_pairs_are_compared_not_means():
    # spread over seeds is large, each pair differs by the same point
    goal, _ = compare("cnn", study([0.1, 0.5, 0.9], [0.11, 0.511, 0.912], [0.5] * 3, [0.5] * 3))
    assert goal.met
    goal, _ = compare("cnn", study([0.1, 0.5, 0.9], [0.3, 0.4, 0.95], [0.5] * 3, [0.5] * 3))
    assert not goal.met


def test_stopped_takes_whole_epochs_nearest_to_the_flops():
    static = cell("static", 0.5, flops=1000, epochs=10)
    assert [stopped_epochs(static, flops) for flops in (1000, 740, 760, 1500, 1)] == [10, 7, 8, 15, 1]


def test_a_finished_cell_is_taken_over_only_with_the_same_settings(tmp_path):
    config = load_config(REPOSITORY / "configs" / "digits_mlp.yaml")
    one = _Study("mlp", config, tmp_path, lambda line: None)
    done = cell("none", 0.9, settings=one._settings)
    one._path(0, "none").write_text(done.model_dump_json())
    assert one._read(0, "none") == done
    assert one._read(1, "none") is None
    other = load_config(REPOSITORY / "configs" / "digits_mlp.yaml", ["tolaria.epochs=2"])
    assert _Study("mlp", other, tmp_path, lambda line: None)._read(0, "none") is None


def test_the_static_network_has_the_grown_parts_newly_initialised():
    settings = [
        "tolaria.epochs=4",
        "tolaria.batch_size=256",
        "deterministic=true",
        "tezzeret.blueprints=[mlp_adapter]",
        "tamiyo.warmup_epochs=0",
        "tamiyo.schedule=[{epoch: 0, site: blocks.0.1, blueprint: mlp_adapter, strategy: direct}]",
    ]
    config = load_config(REPOSITORY / "configs" / "digits_mlp.yaml", settings)
    data = load_data(config.data, task=config.task, seed=0)
    grown = small(config, data, policy="schedule", say=lambda line: None)
    assert grown.parts == ("blocks.0.1:mlp_adapter",)

    def fresh():
        return build_host(config.host, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=config.seed)

    plain, host = with_parts(fresh(), grown.growth, config, data), fresh()
    assert sum(p.numel() for p in plain.parameters()) == grown.summary.params.final
    weights = plain.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in host.state_dict().items())
    kernel = {key: value for key, value in weights.items() if key not in host.state_dict()}
    assert kernel
    assert not any(key.startswith("_esper") for key in kernel)
    # zero at birth: untrained, the whole computes what the host does
    x = data.val[0][:8]
    assert torch.equal(plain.eval()(x), host.eval()(x))
    assert any(value.abs().sum() > 0 for value in kernel.values())
