"""Native code on Urabrask's bench: right code passes, and each fault is found. No compiler runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from native_samples import NANS, native_of

from esper.leyline import KernelRejectedError, SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.leyline.native import NativeVerdict
from esper.leyline.runtime import NativeKernel, NativeModule
from esper.urabrask.native import _split_block, examine_native
from esper.urza.library import load_library

SITE = SiteSignature(kind=SiteKind.VECTOR, channels=6)
MODULE = lower(load_library()["mlp_adapter"].ir, SITE)


class Watched(NativeKernel):
    """Keeps the sizes of the batches that it is tried with, and whether each was contiguous."""

    met: set[tuple[int, bool]]

    def conflict(self, h: torch.Tensor) -> str | None:
        self.met.add((h.shape[0], h.is_contiguous()))
        return super().conflict(h)


@pytest.fixture(scope="module")
def right() -> tuple[NativeVerdict, Watched]:
    """Right code, examined once for all that is asked about it: nearly all of it is timing, about 2 s."""
    sample = native_of(MODULE, SITE)
    watched = Watched("w", sample.facts, sample.forward, sample.backward)
    watched.met = set()
    return examine_native(MODULE, SITE, watched), watched


def test_right_code_passes_every_check(right):
    verdict, _ = right
    assert all(check.passed for check in verdict.checks), verdict.checks
    assert verdict.tolerance == 0.0
    assert verdict.timing is not None


@pytest.mark.parametrize("where", NANS)
def test_a_nan_anywhere_is_refused(where: str):
    with pytest.raises(KernelRejectedError, match="not finite"):
        examine_native(MODULE, SITE, native_of(MODULE, SITE, **NANS[where]))


def test_an_infinity_is_refused():
    kernel = native_of(MODULE, SITE, backward=lambda found: [*found[:-1], found[-1] / 0.0])
    with pytest.raises(KernelRejectedError, match="a gradient that is not finite"):
        examine_native(MODULE, SITE, kernel)


def test_a_wrong_gradient_fails_its_check_and_nothing_is_timed():
    kernel = native_of(MODULE, SITE, backward=lambda found: [found[0] * 1.01, *found[1:]])
    verdict = examine_native(MODULE, SITE, kernel)
    assert [check.name for check in verdict.checks if not check.passed] == ["native.gradient"]
    assert verdict.timing is None
    assert "native.gradient" in verdict.reason
    assert torch.isfinite(torch.tensor(verdict.tolerance))


NAMES = [f"native.stable_{which}" for which in ("large", "tiny", "zero", "nan", "inf")]


def test_the_report_says_what_was_looked_at_and_what_the_forward_keeps(right):
    verdict, _ = right
    names = [check.name for check in verdict.checks]
    assert names == ["native.output", "native.gradient", *NAMES, "native.deterministic", "native.speed"]
    # the sample saves its inputs: the parameters, which are not counted, and 32 samples of h
    assert verdict.figures["native_saved_bytes"] == 32 * 6 * 4
    assert verdict.figures["eager_saved_bytes"] > 32 * 6 * 4


def spoiled(where: Sequence[bool] | torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.as_tensor(where), torch.nan, tensor)


@pytest.mark.parametrize(
    ("name", "is_met"),
    [
        ("large", lambda h: 1e3 < h.abs().max() < torch.inf),
        ("tiny", lambda h: 0 < h.abs().max() < 1e-20),
        ("zero", lambda h: h.abs().max() == 0),
        ("nan", lambda h: h.isnan().any()),
        ("inf", lambda h: h.isinf().any()),
    ],
)
def test_each_extreme_input_has_a_check_that_fails(name: str, is_met):
    right = native_of(MODULE, SITE)

    def forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        [y] = right.forward(inputs)
        return [spoiled(is_met(inputs[-1]), y)]

    def backward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        found = right.backward(inputs)
        return [*found[:-1], spoiled(is_met(inputs[-2]), found[-1])]

    for kernel, what in (
        (NativeKernel("f", right.facts, forward, right.backward), "the output"),
        (NativeKernel("b", right.facts, right.forward, backward), "the gradient of h"),
    ):
        verdict = examine_native(MODULE, SITE, kernel)
        [failed] = [check for check in verdict.checks if not check.passed]
        assert failed.name == f"native.stable_{name}"
        assert what in failed.detail
        assert verdict.timing is None
        assert f"native.stable_{name}: not finite where eager is" in verdict.reason


def test_code_that_raises_at_an_extreme_input_has_failed_with_its_words():
    right = native_of(MODULE, SITE)

    def forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if inputs[-1].isnan().any():
            raise RuntimeError("run_func_ failed")
        return right.forward(inputs)

    verdict = examine_native(MODULE, SITE, NativeKernel("r", right.facts, forward, right.backward))
    [failed] = [check for check in verdict.checks if not check.passed]
    assert (failed.name, failed.detail) == ("native.stable_nan", "raises: run_func_ failed")


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_code_that_does_not_repeat_itself_fails(place: str):
    turns = iter(range(10_000))

    def change(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [tensors[0] * (1.0 + 2**-22 * (next(turns) % 2)), *tensors[1:]]

    verdict = examine_native(MODULE, SITE, native_of(MODULE, SITE, **{place: change}))
    [failed] = [check for check in verdict.checks if not check.passed]
    assert failed.name == "native.deterministic"
    assert ("the output" if place == "forward" else "the gradient of ") in failed.detail


def test_it_is_tried_with_odd_batches_and_inputs_that_are_not_contiguous(right):
    _, watched = right
    met = watched.met
    assert {batch for batch, _ in met} >= {1, 2, 3, 16, 17, 64}
    assert (17, False) in met
    assert (17, True) in met


def test_forward_and_backward_are_timed_apart_too(right):
    timing = right[0].timing
    assert timing is not None
    for part in (timing.forward, timing.backward):
        assert part is not None
        assert part.ratio > 0
        assert part.spread >= 0
        assert part.native_ms > 0
        assert part.eager_ms > 0


def test_the_parts_are_told_apart_by_where_the_work_is():
    worked = {"s": 0.0}

    def working(seconds: float):
        def change(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
            worked["s"] += seconds
            return tensors

        return change

    module = copy.deepcopy(MODULE).requires_grad_()
    native = NativeModule(native_of(module, SITE, forward=working(2.0), backward=working(5.0)), module)
    h, tangent = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    taken = _split_block(native, [h, *module.parameters()], tangent, lambda: worked["s"], steps=3)
    assert taken == (2.0, 5.0)
