import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def data_root():
    """The folder of shared data: ESPER_DATA, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("ESPER_DATA", CHECKOUT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no data folder at {root}; set ESPER_DATA")
    return str(root)
