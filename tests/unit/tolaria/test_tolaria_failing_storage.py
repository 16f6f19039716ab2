"""A folder that cannot be read for a while: what is asked of it meanwhile is answered afterwards."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from esper.tolaria.patience import PatientStorage


class Folder(PatientStorage):
    """One whose place is a link: to a folder, or to a file, below which nothing can be read or written."""

    def lead(self, to: str) -> None:
        """Changes the link at once: nobody finds neither."""
        place = Path(self.root)
        draft = place.with_name("draft")
        draft.symlink_to(place.with_name(to))
        draft.replace(place)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "file").touch()
    storage = Folder((tmp_path / "run").as_uri())
    storage.lead("whole")
    storage.write("kept/one", b"1")
    return storage


DEEDS = {
    "read": lambda folder: folder.read("kept/one") == b"1",
    "names": lambda folder: folder.names("kept") == ["one"],
    "remove": lambda folder: folder.remove("kept/one"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_what_is_asked_meanwhile_is_done_afterwards(folder, deed, caplog):
    folder.lead("file")
    results = []
    thread = threading.Thread(target=lambda: results.append(DEEDS[deed](folder)))
    thread.start()
    while "storage.failing" not in caplog.text:
        assert thread.is_alive()
        thread.join(0.005)
    folder.lead("whole")
    thread.join()
    assert results in ([True], [None])
