"""Native code on Urabrask's bench: right code passes, and each fault is found. No compiler runs."""

from __future__ import annotations

import pytest
import torch
from native_samples import NANS, native_of

from esper.leyline import KernelRejectedError, SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.urabrask.native import examine_native
from esper.urza.library import load_library

SITE = SiteSignature(kind=SiteKind.VECTOR, channels=6)
MODULE = lower(load_library()["mlp_adapter"].ir, SITE)


def test_right_code_passes_every_check():
    verdict = examine_native(MODULE, SITE, native_of(MODULE, SITE))
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
