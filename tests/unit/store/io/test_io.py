"""Objects appear whole or not at all, once, whoever writes them."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from shared.basics.errors import GranaryError
from shared.store.io.base import ObjectMissingError
from shared.store.io.local import LocalIO
from shared.store.io.open import open_io


@pytest.fixture(params=["local", "memory"])
def io(request, tmp_path):
    return open_io(tmp_path / "root" if request.param == "local" else f"memory://{tmp_path}/root")


def test_a_put_is_the_whole_and_a_second_one_changes_nothing(io):
    assert io.put("a/b/c", [b"hello ", memoryview(b"world"), bytearray(b"!")])
    assert io.get("a/b/c") == b"hello world!"
    assert not io.put("a/b/c", [b"other"])
    assert io.get("a/b/c") == b"hello world!"
    assert io.put("a/b/c", [b"other"], replace=True)
    assert io.get("a/b/c") == b"other"
    assert io.size("a/b/c") == 5
    assert io.size("a/b/d") is None
    assert io.listing() == {"a/b/c": 5}
    assert io.listing("a") == {"a/b/c": 5}
    assert io.listing("nothing") == {}
    io.delete("a/b/c")
    io.delete("a/b/c")
    assert io.listing() == {}


def test_ranges_are_scattered_into_the_buffers(io):
    data = bytes(range(256)) * 10
    io.put("x", [data])
    buffers = [bytearray(3), bytearray(0), bytearray(1000), bytearray(7)]
    io.read_into("x", 11, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data[11 : 11 + 1010]
    many = [bytearray(1) for _ in range(1500)]  # more than one system call takes
    io.read_into("x", 5, [memoryview(buffer) for buffer in many])
    assert b"".join(many) == data[5:1505]


def test_what_is_missing_or_short_is_named(io):
    io.put("x", [b"12345"])
    with pytest.raises(ObjectMissingError, match="y is missing from"):
        io.get("y")
    with pytest.raises(ObjectMissingError, match="y is missing from"):
        io.read_into("y", 0, [memoryview(bytearray(1))])
    with pytest.raises(GranaryError, match="x is shorter than its commit record says"):
        io.read_into("x", 3, [memoryview(bytearray(3))])


def test_a_failing_producer_leaves_nothing(io):
    def parts():
        yield b"some"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        io.put("a/x", parts())
    assert io.listing() == {}
    assert io.leftovers() == []
    assert io.put("a/x", [b"whole"])


HOLD = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, b"half")
print("holding", flush=True)
time.sleep(60)
"""


def test_a_live_writer_is_respected_and_a_dead_one_is_cleaned_up_after(tmp_path):
    io = LocalIO(str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".x.tmp")], stdout=subprocess.PIPE)
    with process:
        process.stdout.readline()
        with pytest.raises(GranaryError, match="another process is writing x of this store"):
            io.put("x", [b"mine"])
        assert io.leftovers() == []
        assert io.listing() == {}
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while io.leftovers() != [".x.tmp"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert io.leftovers() == [".x.tmp"]
    assert io.put("x", [b"mine"])
    assert io.get("x") == b"mine"
    assert os.listdir(tmp_path) == ["x"]


def test_a_writer_that_died_between_link_and_unlink_leaves_the_object_alone(tmp_path):
    io = LocalIO(str(tmp_path))
    io.put("x", [b"published"])
    os.link(tmp_path / "x", tmp_path / ".x.tmp")
    assert not io.put("x", [b"published"])
    assert io.get("x") == b"published"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_system_without_hard_links_still_never_replaces(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    io = LocalIO(str(tmp_path))
    assert io.put("x", [b"one"])
    assert not io.put("x", [b"two"])
    assert io.get("x") == b"one"
    assert os.listdir(tmp_path) == ["x"]


def test_other_errors_of_the_system_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GranaryError, match=r"cannot write .*file/x: Not a directory"):
        LocalIO(str(tmp_path)).put("file/x", [b""])
    with pytest.raises(GranaryError, match="is not a URL that can be opened"):
        open_io("nosuchprotocol://x/y")


def test_room_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    assert LocalIO(str(tmp_path / "not/yet/there")).free_bytes() > 0
    assert open_io("memory://x").free_bytes() is None
