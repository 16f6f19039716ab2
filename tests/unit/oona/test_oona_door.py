"""The door of a shard and the connection to it: requests, errors, and what becomes of either when the other goes."""

import asyncio
import json
import os
import socket
import struct
import threading
import time

import pytest
from bus_conformance import WAIT_S

from esper.leyline.errors import NotFoundError
from esper.oona import door as door_module
from esper.oona.door import HEAD, NAME, WAIT, Ask, Door, unpacked_error
from esper.oona.link import Link, LinkLostError


class Shard:
    """Answers what it was asked, and waits when told to."""

    def __init__(self):
        self.cancelled = threading.Event()
        self.waiting = threading.Event()

    async def append(self, body, wait_s):
        if body == b"bug":
            raise RuntimeError("a bug")
        return body == b"yes" and wait_s == 2.5

    async def poll(self, group, member, number, max_records, wait_s):
        if group == "gone":
            raise NotFoundError("no group gone", field="group", remedy="join")
        if group == "wait":
            self.waiting.set()
            try:
                await asyncio.sleep(WAIT_S)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return json.dumps([group, member, number, max_records, wait_s]).encode() * 100_000

    async def ack(self, group, spans):
        assert (group, spans) == ("g", [range(1, 3), range(7, 8)])


@pytest.fixture
def opened(tmp_path):
    """A door on a loop of its own, in a directory whose path is too long for a socket's."""
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    shard = Shard()
    door = Door(directory, shard)
    asyncio.run_coroutine_threadsafe(door.open(), loop).result(WAIT_S)

    def close():
        async def end():
            door.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        if thread.is_alive():
            asyncio.run_coroutine_threadsafe(end(), loop).result(WAIT_S)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    yield directory, shard, close
    close()


@pytest.fixture
def link(opened):
    link = Link(opened[0])
    yield link
    link.close()


def test_requests_are_answered_whatever_their_size(link):
    assert link.ask(Ask.APPEND, WAIT.pack(2.5), b"yes").result(WAIT_S) == b"\1"
    assert link.ask(Ask.APPEND, WAIT.pack(2.5), b"n" * 3_000_000).result(WAIT_S) == b"\0"
    request = ["g", "m", 3, 256, 0.5]
    answer = link.ask(Ask.POLL, json.dumps(request).encode()).result(WAIT_S)
    assert answer == json.dumps(request).encode() * 100_000
    assert link.ask(Ask.ACK, json.dumps(["g", [[1, 3], [7, 8]]]).encode()).result(WAIT_S) == b""


def test_answers_come_in_any_order(link, opened):
    slow = link.ask(Ask.POLL, json.dumps(["wait", "m", 0, 1, 0]).encode())
    assert opened[1].waiting.wait(WAIT_S)
    assert link.ask(Ask.APPEND, WAIT.pack(2.5), b"yes").result(WAIT_S) == b"\1"
    assert not slow.done()


def test_errors_of_the_tree_come_back_as_they_were_and_bugs_are_told(link, caplog):
    with pytest.raises(NotFoundError, match=r"^group: no group gone \(join\)$"):
        link.ask(Ask.POLL, json.dumps(["gone", "m", 0, 1, 0]).encode()).result(WAIT_S)
    error = link.ask(Ask.APPEND, WAIT.pack(2.5), b"bug").exception(WAIT_S)
    assert "a bug" in str(error)
    assert "oona.door.failed" in caplog.messages
    assert type(unpacked_error(b'["Path","m",null,null]')).__name__ == "EsperError"


def test_who_goes_is_not_answered_and_what_waited_for_is_ended(link, opened):
    answer = link.ask(Ask.POLL, json.dumps(["wait", "m", 0, 1, 0]).encode())
    assert opened[1].waiting.wait(WAIT_S)
    link.close()
    assert isinstance(answer.exception(WAIT_S), LinkLostError)
    assert opened[1].cancelled.wait(WAIT_S)
    assert not link.is_up
    assert isinstance(link.ask(Ask.APPEND, b"").exception(WAIT_S), LinkLostError)


def test_whoever_waits_for_a_shard_that_goes_is_told(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        with door_module.reachable(tmp_path) as path:
            listening.bind(path)
        listening.listen()
        link = Link(tmp_path)
        peer, _ = listening.accept()
        answers = [link.ask(Ask.APPEND, b"x") for _ in range(3)]
        peer.send(HEAD.pack(9, 0, 0) + b"half")
        peer.close()
    assert all(isinstance(answer.exception(WAIT_S), LinkLostError) for answer in answers)


def test_a_shard_that_does_not_read_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("esper.oona.link.SEND_S", 1)
    with socket.socket(socket.AF_UNIX) as listening:
        with door_module.reachable(tmp_path) as path:
            listening.bind(path)
        listening.listen()
        link = Link(tmp_path)
        began = time.monotonic()
        answer = link.ask(Ask.APPEND, b"x" * (8 << 20))
        assert isinstance(answer.exception(WAIT_S), LinkLostError)
        assert time.monotonic() - began < WAIT_S
        assert not link.is_up


def test_another_user_is_not_let_in(opened, monkeypatch, caplog):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    link = Link(opened[0])
    assert isinstance(link.ask(Ask.APPEND, WAIT.pack(2.5), b"yes").exception(WAIT_S), LinkLostError)
    assert "oona.door.refused" in caplog.messages


def test_a_head_that_promises_too_much_is_refused(opened, caplog):
    with socket.socket(socket.AF_UNIX) as visitor:
        with door_module.reachable(opened[0]) as path:
            visitor.connect(path)
        visitor.settimeout(WAIT_S)
        visitor.sendall(struct.pack("<IQB", (1 << 30) + 1, 0, 1))
        assert visitor.recv(1) == b""
    assert "oona.door.refused" in caplog.messages


def test_nobody_is_behind_a_closed_door(opened):
    directory, _, close = opened
    assert (directory / NAME).stat().st_mode & 0o777 == 0o600
    close()
    with pytest.raises(OSError, match=r"No such file|refused"):
        Link(directory)
