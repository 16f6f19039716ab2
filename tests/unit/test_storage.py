"""Addresses, and files below them, on a directory and on an S3 server."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading

import certificates
import pytest

from esper.leyline import NotFoundError, StorageError
from esper.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path / "store")


class TestAddress:
    def test_all_spellings_of_a_directory_are_one_address(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        spellings = [tmp_path / "s", str(tmp_path / "s"), "s", "~/s", f"file://{tmp_path}/s", f"file://{tmp_path}/s/"]
        assert {Storage.at(spelling).uri for spelling in spellings} == {f"file://{tmp_path}/s"}
        assert len({Storage.at(spelling).key for spelling in spellings}) == 1
        assert Storage.at("other").key != Storage.at("s").key

    def test_a_directory_with_a_space_lies_where_it_should(self, tmp_path):
        storage = Storage.at(tmp_path / "a b")
        storage.check_writable()
        storage.below("c d").write("e f", b"1")
        assert (tmp_path / "a b" / "c d" / "e f").read_bytes() == b"1"
        assert (storage.shown, storage.below("c d").local) == (str(tmp_path / "a b"), tmp_path / "a b" / "c d")

    def test_s3_options_reach_both_drivers(self):
        options = {"endpoint_url": "http://127.0.0.1:1", "key": "k", "secret": "hidden", "region": "us-east-1"}
        storage = Storage.at("s3://bucket/prefix/", options)
        assert storage.uri == "s3://bucket/prefix"
        assert storage.path("blobs", "x") == "bucket/prefix/blobs/x"
        assert storage.child("events") == "s3://bucket/prefix/events"
        assert storage.delta_options == {
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
            "AWS_ACCESS_KEY_ID": "k",
            "AWS_SECRET_ACCESS_KEY": "hidden",
            "AWS_REGION": "us-east-1",
            "AWS_CONDITIONAL_PUT": "etag",
            "AWS_ALLOW_HTTP": "true",
        }
        assert storage.fs.key == "k"
        assert storage.fs.endpoint_url == "http://127.0.0.1:1"
        assert "hidden" not in repr(storage)

    def test_an_endpoint_of_the_environment_may_be_plain_http_too(self, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        assert Storage.at("s3://bucket").delta_options["AWS_ALLOW_HTTP"] == "true"
        monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
        assert "AWS_ALLOW_HTTP" not in Storage.at("s3://bucket").delta_options

    @pytest.mark.parametrize(
        ("address", "options", "field"),
        [
            ("gs://bucket", None, "storage"),
            ("s3://", None, "storage"),
            ("file://relative", None, "storage"),
            ("s3://bucket", {"endpoint": "x"}, "storage_options.endpoint"),
            ("s3://bucket", {"ca_bundle": "nowhere.pem"}, "storage_options.ca_bundle"),
            ("dir", {"key": "x"}, "storage_options.key"),
        ],
    )
    def test_what_is_wrong_is_named(self, address, options, field):
        with pytest.raises(StorageError) as caught:
            Storage.at(address, options)
        assert caught.value.field == field
        assert caught.value.remedy

    def test_an_address_that_cannot_be_written_is_named_with_setting_and_remedy(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        storage = Storage.at(tmp_path / "file" / "store")
        with pytest.raises(StorageError) as caught:
            storage.check_writable()
        assert (caught.value.field, storage.uri in str(caught.value)) == ("storage", True)
        assert caught.value.remedy
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_the_probe_leaves_nothing_behind(self, storage, tmp_path):
        storage.check_writable()
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "store").mkdir()
        storage.check_writable()
        assert list((tmp_path / "store").iterdir()) == []

    def test_it_pickles_after_use(self, storage):
        storage.check_writable()
        assert pickle.loads(pickle.dumps(storage)) == storage


class TestFiles:
    @pytest.fixture(params=["directory", "s3"])
    def place(self, request, tmp_path):
        if request.param == "directory":
            return Storage.at(tmp_path / "store")
        return Storage.at(f"s3://bucket/{tmp_path.name}", request.getfixturevalue("s3_options"))

    def test_a_file_is_replaced_whole(self, place):
        place.write("a/b.json", b"1")
        place.write("a/b.json", memoryview(b"2"))
        place.below("a").write("c/d", b"3")
        assert (place.read("a/b.json"), place.read("a/c/d")) == (b"2", b"3")
        assert (place.names(), place.names("a"), place.names("nowhere")) == (["a"], ["b.json", "c"], [])

    def test_what_is_removed_is_gone(self, place):
        place.write("a/b", b"1")
        place.write("a/c/d", b"1")
        place.remove("a/b")
        assert place.names("a") == ["c"]
        place.remove("a")
        place.remove("a")
        assert place.names() == []

    def test_what_is_moved_has_the_other_name_alone(self, place):
        place.write("a/b", b"1")
        place.move("a/b", "c/d/e")
        assert (place.names("a"), place.read("c/d/e")) == ([], b"1")
        with pytest.raises(NotFoundError, match="no a/b below"):
            place.move("a/b", "c/d/f")
        assert place.names("c/d") == ["e"]

    def test_what_is_not_there_is_not_found(self, place):
        with pytest.raises(NotFoundError, match=f"no a/b below {place.shown}"):
            place.read("a/b")

    def test_only_a_directory_appends(self, storage, s3_options):
        storage.append("log/lines", b"1")
        storage.append("log/lines", b"2")
        assert storage.read("log/lines") == b"12"
        with pytest.raises(StorageError, match="cannot append"):
            Storage.at("s3://bucket/x", s3_options).append("lines", b"1")

    def test_a_part_of_a_line_does_not_stay(self, storage):
        storage.append("lines", b"first\n")
        code = (
            "import resource, signal, sys\n"
            "from esper.leyline import StorageError\n"
            "from esper.storage import Storage\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))\n"  # three bytes of the next line still fit
            "try:\n"
            "    Storage.at(sys.argv[1]).append('lines', b'second\\n')\n"
            "except StorageError as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, storage.uri], capture_output=True, text=True, check=True)
        assert "File too large" in done.stdout
        storage.append("lines", b"third\n")
        assert storage.read("lines") == b"first\nthird\n"

    def test_each_failure_names_the_file_and_the_remedy(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        blocked = Storage.at(tmp_path / "file")
        attempts = [lambda: blocked.write("x", b"1"), lambda: blocked.append("x", b"1"), lambda: blocked.read("x")]
        for attempt in attempts:
            with pytest.raises(StorageError, match="file/x") as caught:
                attempt()
            assert (caught.value.field, bool(caught.value.remedy)) == ("storage", True)

    def test_a_server_that_refuses_is_named(self, s3_options):
        with pytest.raises(StorageError, match=r"s3://nowhere") as caught:
            Storage.at("s3://nowhere", s3_options).write("x", b"1")
        assert "bucket" in caught.value.remedy


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    """An S3 server behind TLS, with one bucket; its address and its authority's certificate."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    authority, certificate, key = certificates.issue(tmp_path_factory.mktemp("tls"))
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=(str(certificate), str(key)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}", authority
    server.shutdown()
    thread.join()
    server.server_close()


class TestTls:
    @pytest.fixture(autouse=True)
    def untold(self, monkeypatch):
        for name in ("SSL_CERT_FILE", "AWS_CA_BUNDLE"):
            monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it meanwhile
            monkeypatch.delenv(name)

    @pytest.mark.parametrize("told_by", ["option", "environment"])
    def test_both_drivers_trust_the_authority_that_is_named(self, tls_server, told_by, monkeypatch):
        import pyarrow as pa
        from deltalake import DeltaTable, write_deltalake

        endpoint, authority = tls_server
        options = {"endpoint_url": endpoint, "key": "k", "secret": "s", "region": "eu-west-1"}
        if told_by == "option":
            options["ca_bundle"] = str(authority)
        else:
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority))
        storage = Storage.at(f"s3://tls-{told_by}", options)
        storage.fs.mkdir(f"tls-{told_by}")
        storage.write("a", b"1")
        assert storage.read("a") == b"1"
        write_deltalake(storage.child("t"), pa.table({"x": [1]}), storage_options=storage.delta_options)
        table = DeltaTable(storage.child("t"), storage_options=storage.delta_options)
        assert table.to_pyarrow_table()["x"].to_pylist() == [1]

    def test_an_authority_that_nobody_named_is_refused(self, tls_server):
        options = {"endpoint_url": tls_server[0], "key": "k", "secret": "s", "region": "eu-west-1"}
        with pytest.raises(StorageError, match=r"(?i)certificate|ssl"):
            Storage.at("s3://bucket", options).write("a", b"1")
