"""Telemetry: right figures from streams, and no effect on the host."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kasmina_support import HOSTS, Driver, assert_equal, fingerprint, wrapped

from esper.config import KasminaConfig
from esper.kasmina.health import Health, chunks_of, health_of_chunks, health_of_site
from esper.kasmina.observer import PROBE_EVERY, PROBE_FEATURES, Observer, some_rows
from esper.leyline import ConflictError, SeedStage, SiteKind, SiteSignature

MAP = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=3, extent=(4, 5))
VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=5)
SEQUENCE = SiteSignature(kind=SiteKind.SEQUENCE, channels=4, extent=(6,))


def rows_of(h, signature):
    if signature.kind is SiteKind.FEATURE_MAP:
        return h.permute(0, 2, 3, 1).reshape(-1, signature.channels).double()
    return h.reshape(-1, signature.channels).double()


@pytest.mark.parametrize("signature", [MAP, VECTOR, SEQUENCE], ids=lambda s: s.kind.value)
def test_streams_agree_with_all_samples_at_once(signature):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(signature.shape(n), generator=generator) * 2 + 1 for n in (3, 1, 8)]
    observer = Observer("x", signature)
    for h in parts:
        observer.watch(h)
    rows = torch.cat([rows_of(h, signature) for h in parts])
    correlation = torch.corrcoef(rows.T).abs()
    num = signature.channels
    health = health_of_site(observer.sums())
    assert health.num_samples == 12
    assert health.activation_variance == pytest.approx(rows.var(0, correction=0).mean().item(), rel=1e-6)
    assert health.avg_correlation == pytest.approx((correlation.sum().item() - num) / (num * (num - 1)), rel=1e-6)
    assert health.dead_neuron_ratio == 0.0
    assert health.gradient_norm is None
    assert health.grow_potential is None


@given(offset=st.floats(-1e6, 1e6), sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4))
def test_a_large_mean_does_not_eat_the_variance(offset, sizes):
    generator = torch.Generator().manual_seed(0)
    observer = Observer("x", VECTOR)
    parts = [(torch.randn(n, 5, generator=generator, dtype=torch.float64) + offset).float() for n in sizes]
    for part in parts:
        observer.watch(part)
    expected = torch.cat(parts).double().var(0, correction=0).mean().item()
    assert health_of_site(observer.sums()).activation_variance == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_dead_channels_are_counted_and_not_correlated():
    h = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    h[:, 1] = 0.0
    h[:, 3] = -h[:, 0]
    observer = Observer("x", VECTOR)
    observer.watch(h)
    health = health_of_site(observer.sums())
    assert health.dead_neuron_ratio == pytest.approx(0.2)
    alive = torch.corrcoef(h[:, [0, 2, 3, 4]].double().T).abs()
    assert health.avg_correlation == pytest.approx((alive.sum().item() - 4) / 12)
    assert health.score == pytest.approx(0.8 * math.sqrt(1 - health.avg_correlation**2))


def test_gradient_and_growth_potential_are_those_of_a_zeroed_last_layer():
    torch.manual_seed(0)
    observer = Observer("fc", VECTOR)
    pulls, norms = [], []
    for step in range(2 * PROBE_EVERY + 1):
        h = torch.randn(7, 5, requires_grad=True)
        target = torch.randn(7, 5)
        out = h * 1.0
        observer.watch(out)
        ((out - target) ** 2).mean().backward()
        # the same, by a kernel relu(h U) W with W = 0
        probe = observer._probe_cp
        last = torch.zeros(PROBE_FEATURES, 5, requires_grad=True)
        ((h.detach() + torch.relu(h.detach() @ probe) @ last - target) ** 2).mean().backward()
        if step % PROBE_EVERY == 0:
            pulls.append(last.grad)
        norms.append(h.grad.norm(dim=1).mean())
    health = health_of_site(observer.sums())
    assert health.grow_potential == pytest.approx(
        torch.stack(pulls).mean(0).norm().item() / math.sqrt(PROBE_FEATURES), rel=1e-5
    )
    assert health.gradient_norm == pytest.approx(torch.stack(norms).mean().item(), rel=1e-5)


def test_a_probe_of_a_map_is_taken_at_every_position():
    torch.manual_seed(0)
    signature = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=3, extent=(20, 20))
    observer = Observer("x", signature)
    h = torch.randn(signature.shape(4), requires_grad=True)
    out = h * 1.0
    observer.watch(out)
    out.square().sum().backward()
    rows, gradient = (t.detach().permute(0, 2, 3, 1).reshape(-1, 3).double() for t in (h, h.grad))
    expected = gradient.T @ torch.relu(rows @ observer._probe_cp.double())
    health = health_of_site(observer.sums())
    assert health.grow_potential == pytest.approx(expected.norm().item() / math.sqrt(PROBE_FEATURES), rel=1e-5)
    assert health.gradient_norm == pytest.approx(h.grad.flatten(1).norm(dim=1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 20, 20), (700, 3, 2, 2), (1, 3, 32, 32), (3, 3, 1, 1), (2, 3, 40, 7)])
def test_the_rows_of_a_step_are_spread_evenly_and_change_from_step_to_step(shape):
    """Every row carries its own number, so what was taken is known."""
    num, channels = math.prod(shape) // shape[1], shape[1]
    numbers = torch.arange(num, dtype=torch.float32).reshape(shape[0], 1, *shape[2:]).expand(shape)
    turns = [some_rows(numbers, SiteKind.FEATURE_MAP, turn=turn) for turn in range(200)]
    assert all(rows.shape[1] == channels for rows in turns)
    assert all(min(num, 200) <= len(rows) <= 512 for rows in turns)
    taken = torch.cat([rows[:, 0] for rows in turns]).unique()
    assert len(taken) == num, "in the long run every row has its turn"
    if num > 512 > shape[0]:
        columns = turns[0][:, 0].long() % shape[3]
        assert len(columns.unique()) == min(shape[3], len(turns[0]))


def test_one_live_position_in_a_large_map_is_a_live_channel():
    signature = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=3, extent=(50, 50))
    h = torch.zeros(signature.shape(2))
    h[1, 0, 31, 17] = -3.0
    observer = Observer("x", signature)
    observer.watch(h)
    assert health_of_site(observer.sums()).dead_neuron_ratio == pytest.approx(2 / 3)


def test_figures_of_a_large_map_are_those_of_all_its_rows_but_for_noise():
    signature = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=3, extent=(32, 32))
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.0, 0.0, 2.0]])
    observer = Observer("x", signature)
    for _ in range(20):
        rows = torch.randn(8, 32, 32, 3, generator=generator) @ mix
        observer.watch(rows.permute(0, 3, 1, 2))
    health = health_of_site(observer.sums())
    assert health.activation_variance == pytest.approx(2.0, rel=0.05)
    assert health.avg_correlation == pytest.approx(0.8 / 3, abs=0.02)


def test_a_state_taken_in_the_middle_goes_on_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(MAP.shape(3), generator=generator) for _ in range(7)]
    first = Observer("x", MAP)
    for h in parts[:4]:
        first.watch(h)
    second = Observer("x", MAP)
    second.load(first.state())
    for observer in (first, second):
        for h in parts[4:]:
            observer.watch(h)
    assert health_of_site(first.sums()) == health_of_site(second.sums())


def test_what_waits_is_bounded():
    wide = SiteSignature(kind=SiteKind.VECTOR, channels=4096)
    observer = Observer("x", wide)
    for _ in range(4):
        observer.watch(torch.ones(300, 4096))
    assert sum(sample.rows_nc.numel() for sample in observer._pending) <= 300 * 4096


def test_the_probe_depends_on_the_name_alone_and_draws_nothing():
    before = torch.get_rng_state()
    one, same, other = Observer("a", VECTOR), Observer("a", VECTOR), Observer("b", VECTOR)
    assert torch.equal(one._probe_cp, same._probe_cp)
    assert not torch.equal(one._probe_cp, other._probe_cp)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_measured_is_none():
    assert health_of_site(Observer("x", VECTOR).sums()) == Health()
    assert Health().score is None
    observer = Observer("x", VECTOR)
    observer.watch(torch.full((2, 5), float("nan")))
    assert health_of_site(observer.sums()) == Health(num_skipped=1)


def test_a_constant_layer_scores_nothing():
    observer = Observer("x", VECTOR)
    observer.watch(torch.ones(4, 5))
    assert health_of_site(observer.sums()).avg_correlation is None
    assert health_of_site(observer.sums()).score == 0.0


def test_a_state_of_another_width_is_refused():
    with pytest.raises(ConflictError):
        Observer("x", VECTOR).load(Observer("x", SEQUENCE).state())


# ---------------------------------------------------------------- chunks


@given(channels=st.integers(1, 200), num=st.integers(1, 64))
def test_chunks_hold_every_channel_once_and_are_even(channels, num):
    chunks = chunks_of(channels, num)
    assert [channel for chunk in chunks for channel in chunk] == list(range(channels))
    sizes = {len(chunk) for chunk in chunks}
    assert len(chunks) == min(num, channels)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("signature", [MAP, VECTOR, SEQUENCE], ids=lambda s: s.kind.value)
def test_each_chunk_has_the_figures_of_its_own_channels(signature):
    torch.manual_seed(0)
    observer = Observer("x", signature, num_chunks=2)
    rows, norms, pulls = [], [], []
    for step in range(3):
        h = torch.randn(signature.shape(4)) * 3 + 1
        h.movedim(1 if signature.kind is SiteKind.FEATURE_MAP else -1, 0)[0] = 0.0  # a dead channel
        out = h.requires_grad_() * 1.0
        observer.watch(out)
        out.pow(3).mean().backward()
        gradient_nc = rows_of(h.grad, signature)
        rows.append(rows_of(out.detach(), signature))
        norms.append(gradient_nc.reshape(4, -1, signature.channels))
        if step % PROBE_EVERY == 0:
            pulls.append(gradient_nc.T @ torch.relu(rows[-1] @ observer._probe_cp.double()))
    sums = observer.sums()
    rows_nc, gradient_blc, pull_cp = torch.cat(rows), torch.cat(norms), torch.stack(pulls).mean(0)
    found = health_of_chunks(sums, observer.chunks, observer.watched)
    assert [health.dead_neuron_ratio for health in found] == [1 / len(observer.chunks[0]), 0.0]
    for health, chunk in zip(
        (health_of_site(sums), *found), (range(signature.channels), *observer.chunks), strict=True
    ):
        part = slice(chunk.start, chunk.stop)
        assert health.activation_variance == pytest.approx(rows_nc[:, part].var(0, correction=0).mean().item())
        assert health.gradient_norm == pytest.approx(gradient_blc[:, :, part].norm(dim=(1, 2)).mean().item(), rel=1e-5)
        assert health.grow_potential == pytest.approx(pull_cp[part].norm().item() / PROBE_FEATURES**0.5, rel=1e-5)
        alive = rows_nc[:, part][:, rows_nc[:, part].var(0) > 0]
        num = alive.shape[1]
        expected = (torch.corrcoef(alive.T).abs().sum().item() - num) / (num * (num - 1)) if num > 1 else None
        assert health.avg_correlation == (None if expected is None else pytest.approx(expected))


def test_a_site_of_one_chunk_tells_no_chunks():
    observer = Observer("x", VECTOR)
    observer.watch(torch.ones(2, 5))
    assert health_of_chunks(observer.sums(), observer.chunks, observer.watched) == ()


def test_reports_tell_each_chunk_and_which_asks_most_for_a_kernel():
    driver = Driver("mlp", wrapped("mlp", config=KasminaConfig(chunks=4)), observe_every=1).run_epoch()
    report = driver.reports[0]
    assert [(c.chunk_id, c.first_channel, c.num_channels) for c in report.chunks] == [
        (0, 0, 2), (1, 2, 2), (2, 4, 2), (3, 6, 2),
    ]  # fmt: skip
    potentials = [chunk.grow_potential for chunk in report.chunks]
    assert report.seeds[0].chunk_id == potentials.index(max(potentials)) != 0
    assert math.hypot(*potentials) == pytest.approx(report.seeds[0].grow_potential)


def test_reports_say_how_many_samples_were_no_numbers(monkeypatch):
    driver = Driver("mlp", wrapped("mlp"), observe_every=1)
    watch = Observer.watch
    monkeypatch.setattr(Observer, "watch", lambda self, h: watch(self, h * float("nan")))
    signal = driver.run_epoch().reports[0].seeds[0]
    assert (signal.activation_variance, signal.health_score) == (None, None)
    assert "samples of health were not finite)" in signal.gate


# ---------------------------------------------------------------- where it lies


def test_what_is_kept_moves_with_the_model_and_stays_as_precise():
    """There is one device here, so the move is to torch's `meta`; the precision is asked for by a cast."""
    host = wrapped("mlp")
    layer = host.module._esper.get_submodule("1")
    host.to(torch.float16)
    assert {t.dtype for t in layer.table.fields.values()} <= {torch.uint8, torch.int64, torch.float64}
    assert layer.observer.sums().mean_c.dtype is torch.float64
    host.module._esper.to("meta")
    kept = (*layer.table.fields.values(), *layer.observer.state().values())
    assert {t.device.type for t in kept if isinstance(t, torch.Tensor)} == {"meta"}
    assert host.seeds()[0].stage is SeedStage.DORMANT, "what steers Python does not ask the device"


# ---------------------------------------------------------------- in the host


@pytest.mark.parametrize("name", HOSTS)
def test_observation_has_no_effect_on_the_host(name):
    runs = []
    for observe_every in (0, 1):
        driver = Driver(name, wrapped(name), observe_every=observe_every)
        torch.manual_seed(1)
        driver.train(10).close()
        runs.append((fingerprint(driver), driver.reports))
    assert_equal(runs[0][0], runs[1][0])
    assert all(s.activation_variance is None for r in runs[0][1] for s in r.seeds)
    assert all(s.grow_potential > 0 and s.gradient_norm > 0 for r in runs[1][1] for s in r.seeds)


def test_only_the_hosts_own_training_steps_are_sampled():
    host = wrapped("mlp")
    driver = Driver("mlp", host, observe_every=2)
    driver.train(4)
    driver.host.prepare(4, epoch=0, steps_per_epoch=4, observe=True)
    x = driver.batches[0][0]
    host.eval()
    host(x)
    host.train()
    with torch.no_grad():
        host(x)
    driver.close()
    assert [r.num_samples for r in driver.reports] == [32, 32]
    driver.close()
    assert [r.num_samples for r in driver.reports] == [0, 0]


def test_reports_name_the_site_and_its_seeds():
    driver = Driver("mlp", wrapped("mlp"), observe_every=1).run_epoch()
    first = driver.reports[0]
    assert (first.layer_id, first.run_id, first.epoch, first.step) == ("1", "run", 0, 4)
    assert [s.seed_id for s in first.seeds] == ["s0"]
    assert 0 <= first.seeds[0].health_score <= 1


def test_an_overwritten_activation_is_seen_as_it_was():
    """A ReLU in place, right behind the site, changes the very tensor that the hook was given."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5)),
        torch.nn.ReLU(inplace=True),
        torch.nn.Linear(5, 2),
    )
    from esper.kasmina import wrap

    x = torch.randn(6, 4)
    host = wrap(model, example=(x,), sites="0")
    host.prepare(0, epoch=0, steps_per_epoch=1, observe=True)
    host(x).sum().backward()
    signal = host.close_epoch(run_id="r", epoch=0, step=1, val_loss=None)[0].seeds[0]
    assert signal.activation_variance == pytest.approx(model[0](x).var(0, correction=0).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_a_host_of_another_precision_has_the_same_health(dtype, tolerance):
    def figures(kind):
        host = wrapped("mlp")
        host.to(kind)
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).to(kind)
        host.prepare(0, epoch=0, steps_per_epoch=1, observe=True)
        host(x).square().mean().backward()
        [*seeds] = [r.seeds[0] for r in host.close_epoch(run_id="run", epoch=0, step=1, val_loss=1.0)]
        return [(seed.activation_variance, seed.gradient_norm, seed.grow_potential) for seed in seeds]

    for ours, expected in zip(figures(dtype), figures(torch.float32), strict=True):
        assert ours == pytest.approx(expected, rel=tolerance)
