"""The loader's own test of native code, on code that is right or nearly so. No compiler runs."""

from __future__ import annotations

import pytest
import torch
from native_samples import NANS, native_of

from esper.kasmina.native import _try
from esper.leyline import KernelRejectedError, SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.urza.library import load_library

CPU = torch.device("cpu")
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=6)
MODULE = lower(load_library()["mlp_adapter"].ir, SITE)


def test_right_code_is_taken():
    _try(native_of(MODULE, SITE), MODULE, CPU)


@pytest.mark.parametrize("where", NANS)
def test_a_nan_anywhere_is_refused(where: str):
    with pytest.raises(KernelRejectedError, match="deviates from its IR by inf"):
        _try(native_of(MODULE, SITE, **NANS[where]), MODULE, CPU)


def test_a_gradient_of_nan_alone_is_refused_whatever_the_others_are():
    every = native_of(MODULE, SITE, backward=lambda found: [torch.full_like(g, torch.nan) for g in found])
    with pytest.raises(KernelRejectedError, match="deviates"):
        _try(every, MODULE, CPU)
