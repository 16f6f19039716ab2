"""Unit tests pass with Ray not installed; with `ESPER_TEST_WITHOUT_RAY=1` (as in `make test`) Ray is hidden."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder


class _NoRay(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "ray" or fullname.startswith("ray."):
            raise ModuleNotFoundError("ray is hidden from the unit tests", name=fullname)


if os.environ.get("ESPER_TEST_WITHOUT_RAY") == "1":
    assert "ray" not in sys.modules
    sys.meta_path.insert(0, _NoRay())
