"""A folder that cannot be written for a while: a file stands where it should be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from esper.leyline.errors import StorageError
from esper.tolaria import patience
from esper.tolaria.patience import PatientStorage


class Mending(logging.Handler):
    """Takes what is in the way out of it, once a failure was told of so many times."""

    def __init__(self, obstacle: Path, after: int) -> None:
        super().__init__()
        self.told: list[str] = []
        self._obstacle, self._after = obstacle, after

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        if len(self.told) == self._after:
            self._obstacle.unlink()


@pytest.fixture
def obstacle(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "sub"
    path.parent.mkdir()
    path.write_text("in the way")
    return path


def written(folder: PatientStorage, how: str) -> None:
    (folder.write if how == "write" else folder.append)("sub/file", b"data")


@pytest.mark.parametrize("how", ["write", "append"])
def test_what_fails_is_tried_again_and_told_of(obstacle: Path, how: str):
    mending = Mending(obstacle, after=2)
    patience.log.addHandler(mending)
    try:
        written(PatientStorage.at(obstacle.parent), how)
    finally:
        patience.log.removeHandler(mending)
    assert (obstacle / "file").read_bytes() == b"data"
    assert mending.told == ["storage.failing"] * 2


@pytest.mark.parametrize("how", ["write", "append"])
def test_what_goes_on_failing_is_raised(obstacle: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.setattr(patience, "LIMIT_S", 0.1)
    with pytest.raises(StorageError):
        written(PatientStorage.at(obstacle.parent), how)
    assert obstacle.read_text() == "in the way"
