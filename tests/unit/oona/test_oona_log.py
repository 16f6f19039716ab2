"""The log: what was written comes back, a torn tail is cut, damage elsewhere is refused, one writer at a time."""

import errno
import os
import re

import pytest

from esper.leyline.errors import FencedError, StorageError, UnavailableError
from esper.oona import log as log_module
from esper.oona.frames import Frame
from esper.oona.log import SegmentLog


@pytest.fixture
def filled(tmp_path):
    log = SegmentLog(tmp_path)
    log.roll(0, 0, b"state")
    for body in (b"one", b"", b"three" * 1000):
        log.write(1, body)
    log.close()
    return tmp_path


FRAMES = [Frame(0, b"state"), Frame(1, b"one"), Frame(1, b""), Frame(1, b"three" * 1000)]


def read(directory):
    log = SegmentLog(directory)
    try:
        return list(log.replay()), log.cut_bytes
    finally:
        log.close()


def test_frames_come_back_in_order(filled):
    assert read(filled) == (FRAMES, 0)


@pytest.mark.parametrize("keep", [1, 8, 9, 10, 500])
def test_a_torn_last_frame_is_cut_and_the_rest_stays(filled, keep):
    path = next(filled.glob("*.log"))
    last = 9 + 5000
    size = path.stat().st_size
    os.truncate(path, size - last + keep)
    assert read(filled) == (FRAMES[:3], keep)
    assert read(filled) == (FRAMES[:3], 0)


def test_a_last_frame_with_a_wrong_byte_is_cut(filled):
    path = next(filled.glob("*.log"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read(filled) == (FRAMES[:3], 9 + 5000)


def test_damage_before_the_last_segment_is_refused(filled):
    log = SegmentLog(filled)
    log.roll(3, 0, b"later")
    log.close()
    path = min(filled.glob("*.log"))
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="is damaged at byte 0"):
        read(filled)


@pytest.mark.parametrize("at", [0, 4, 8, 12])  # in the CRC, the length, the kind, the body
def test_a_damaged_frame_in_the_last_segment_is_no_torn_tail(filled, at):
    """What follows it was acknowledged: it must not be cut off without a word."""
    path = max(filled.glob("*.log"))
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(StorageError, match=r"is damaged at byte 0 \(restore"):
        read(filled)
    path.write_bytes(whole)
    assert read(filled) == (FRAMES, 0)


def test_a_segment_that_was_never_finished_is_not_read(filled):
    (filled / "00000001-00000000000000000003.new").write_bytes(b"half a fra")
    assert read(filled) == (FRAMES, 0)


def test_segments_below_an_offset_are_dropped_but_never_the_last(tmp_path):
    log = SegmentLog(tmp_path, segment_bytes=64)
    for offset in (0, 10, 10, 20):
        log.roll(offset, 0, str(offset).encode())
        assert not log.is_full
    log.drop_below(9)
    assert len(log.segments) == 4
    log.drop_below(19)
    assert [frame.body for frame in log.replay()] == [b"10", b"20"]
    log.drop_below(1000)
    assert [frame.body for frame in log.replay()] == [b"20"]
    log.write(1, b"x" * 64)
    assert log.is_full
    log.close()


def test_a_second_writer_is_kept_out_until_the_first_ends(tmp_path):
    first = SegmentLog(tmp_path)
    with pytest.raises(FencedError, match=re.escape(str(tmp_path))):
        SegmentLog(tmp_path)
    first.close()
    SegmentLog(tmp_path).close()


def test_a_full_disk_leaves_the_log_as_it_was(filled, monkeypatch):
    log = SegmentLog(filled)
    log.roll(3, 0, b"state")
    write = os.write

    def short(fd, data):
        if len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, bytes(data)[:60])

    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "write", short)
        with pytest.raises(UnavailableError, match="No space left"):
            log.write(1, b"y" * 80)
    log.write(1, b"fits")
    log.close()
    assert read(filled)[0][-2:] == [Frame(0, b"state"), Frame(1, b"fits")]


def failing(times, code=errno.EIO):
    """A call of the system that fails so often, and then does what `os` does."""

    def wrap(call):
        left = times

        def wrapped(*args):
            nonlocal left
            left -= 1
            if left >= 0:
                raise OSError(code, os.strerror(code))
            return call(*args)

        return wrapped

    return wrap


def test_what_a_failed_sync_lost_is_written_again(filled, monkeypatch):
    log = SegmentLog(filled)
    log.roll(3, 0, b"state")
    log.write(1, b"synced")
    log.sync()
    for body in (b"first", b"second"):
        log.write(1, body)
    path = max(filled.glob("*.log"))
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(log_module.os, "fsync", failing(2)(os.fsync))
        with pytest.raises(UnavailableError, match=r"cannot sync .*Input/output error \(mend the disk"):
            log.sync()
        # what the system could not write it has forgotten, and the next fsync says that all is well
        path.write_bytes(whole[:-25] + bytes(25))
        log.write(1, b"meanwhile")
        with pytest.raises(UnavailableError, match="cannot sync"):
            log.sync()
        log.sync()
    log.write(1, b"after")
    log.close()
    assert [frame.body for frame in read(filled)[0][-6:]] == [
        b"state", b"synced", b"first", b"second", b"meanwhile", b"after"
    ]  # fmt: skip


def test_half_a_frame_that_could_not_be_cut_off_is_cut_off_before_the_next(filled, monkeypatch):
    log = SegmentLog(filled)
    log.roll(3, 0, b"state")

    def torn(fd, data):
        os.pwrite(fd, bytes(data)[:20], 0)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(log_module, "_write_all", torn)
        patch.setattr(log_module.os, "ftruncate", failing(2)(os.ftruncate))
        for _ in range(2):  # at the second, nothing is written behind what is torn
            with pytest.raises(UnavailableError, match="Input/output error"):
                log.write(1, b"y" * 80)
    log.write(1, b"fits")
    log.close()
    assert read(filled) == ([*FRAMES, Frame(0, b"state"), Frame(1, b"fits")], 0)


def test_a_segment_that_could_not_be_made_sure_is_taken_away_again(filled, monkeypatch):
    log = SegmentLog(filled)
    log.roll(3, 0, b"state")
    with monkeypatch.context() as patch:
        patch.setattr(log_module, "sync_directory", failing(1)(log_module.sync_directory))
        with pytest.raises(UnavailableError, match="Input/output error"):
            log.roll(9, 0, b"later")
    log.write(1, b"goes on")
    log.close()
    assert read(filled) == ([*FRAMES, Frame(0, b"state"), Frame(1, b"goes on")], 0)


def test_a_segment_that_cannot_be_deleted_stays_until_the_next_time(filled, monkeypatch):
    log = SegmentLog(filled)
    log.roll(3, 0, b"state")
    with monkeypatch.context() as patch:
        patch.setattr(log_module.Path, "unlink", failing(1)(log_module.Path.unlink))
        log.drop_below(3)
    assert len(log.segments) == 2
    log.drop_below(3)
    assert len(log.segments) == 1
    log.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot use"):
        SegmentLog(tmp_path / "file" / "log")
