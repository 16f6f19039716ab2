"""`esper doctor` says what is wrong, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import socket

import pytest

from jobs import doctor


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("ESPER_DATA", str(tmp_path))
    return tmp_path


def findings(storage):
    return {finding.name: finding for finding in doctor.examine(str(storage))}


def test_everything_is_looked_at_and_no_name_comes_twice(home):
    names = [finding.name for finding in doctor.examine(str(home / "storage"))]
    assert len(set(names)) == len(names)
    expected = {"python", "cores", "memory", "storage", "ray token", "loopback", "ESPER_DATA", "gpu"}
    assert set(names) == expected | {"C++ compiler", *doctor.PACKAGES}


def test_what_is_missing_comes_with_a_remedy(home):
    for finding in doctor.examine(str(home / "storage")):
        assert finding.state in {"ok", "optional", "missing"}
        assert finding.detail
        assert finding.state != "missing" or finding.remedy


def test_a_package_that_is_not_there_is_missing(home, monkeypatch):
    version = importlib.metadata.version

    def without_torch(name):
        if name == "torch":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_torch)
    assert doctor.versions()["torch"] == "not installed"
    found = findings(home / "storage")
    assert found["torch"].state == "missing"
    assert found["torch"].remedy == "make install"
    assert found["pydantic"].state == "ok"


def test_storage_is_tried_and_not_believed(home):
    good = findings(home / "storage")["storage"]
    assert good.state == "ok"
    assert "GiB free" in good.detail
    taken = home / "file"
    taken.write_text("not a folder")
    bad = findings(taken / "storage")["storage"]
    assert bad.state == "missing"
    assert bad.remedy


def test_a_token_that_others_can_read_is_found(home):
    assert findings(home / "storage")["ray token"].state == "ok"
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    exposed = findings(home / "storage")["ray token"]
    assert exposed.state == "missing"
    assert exposed.remedy == f"chmod 600 {token}"
    assert "secret" not in exposed.detail
    token.chmod(0o600)
    private = findings(home / "storage")["ray token"]
    assert private.state == "ok"
    assert "private" in private.detail


def test_a_platform_without_a_token_is_pointed_out(home, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert findings(home / "storage")["ray token"].remedy.startswith("unset it")


def test_closed_sockets_are_found(home, monkeypatch):
    class Closed(socket.socket):
        def bind(self, address):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor.socket, "socket", Closed)
    found = doctor._loopback()
    assert (found.state, found.remedy) == ("missing", "Ray needs local sockets")


def test_data_sets_are_named(home):
    (home / "tinytext").mkdir()
    (home / "readme.txt").touch()
    assert findings(home / "storage")["ESPER_DATA"].detail == "1 data sets: tinytext"


def test_a_compiler_is_tried_and_not_believed(home, tmp_path, monkeypatch):
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    found = findings(home / "storage")["C++ compiler"]
    assert (found.state, found.detail[:21]) == ("optional", "no g++ and no strip: ")
    assert "apt-get install g++ binutils" in found.remedy
    (folder / "strip").symlink_to("/bin/true")
    for script, words in (("echo no space >&2; exit 1", "g++ does not compile: no space"), (None, "does not run")):
        (folder / "g++").write_text(f"#!/bin/sh\n{script}\n" if script else "#!/no/such/shell\n")
        (folder / "g++").chmod(0o755)
        found = findings(home / "storage")["C++ compiler"]
        assert found.state == "optional"
        assert words in found.detail
    (folder / "g++").write_text("#!/bin/sh\necho g++ 12.2\n")
    found = findings(home / "storage")["C++ compiler"]
    assert (found.state, found.detail) == ("ok", "g++ 12.2: native code can be compiled here")
