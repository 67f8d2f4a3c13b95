"""Files that are whole or not there: writers that fail, are killed, or meet one another."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.basics import files
from shared.basics.files import (
    is_abandoned,
    lock_folder,
    make_folders,
    making_folder,
    replacing,
    temporary,
    write_bytes,
    write_text,
    write_together,
)

WRITE_HALF = """
import sys, time
from pathlib import Path
from shared.basics.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""

WRITE_OFTEN = """
import sys
from pathlib import Path
from shared.basics.files import write_text
for _ in range(50):
    write_text(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


def test_what_is_written_is_there_whole_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.json"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_bytes(path, b"")
    assert path.read_bytes() == b""
    assert os.listdir(path.parent) == ["x.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


@given(parts=st.lists(st.binary(max_size=40), max_size=5))
def test_streamed_content_is_its_parts(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("stream") / "x"
    with replacing(path) as file:
        for part in parts:
            file.write(part)
        assert not path.exists()
    assert path.read_bytes() == b"".join(parts)


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with contextlib.suppress(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_content_and_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    kinds = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(kinds[os.path.isdir(f"/proc/self/fd/{fd}")]) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append("rename") or replace(old, new))
    write_bytes(tmp_path / "x", b"content")
    assert events == ["file", "rename", "folder"]
    events.clear()
    make_folders(tmp_path / "a" / "b")
    assert events == ["folder", "folder"]


def test_what_a_killed_writer_left_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    process = subprocess.Popen([sys.executable, "-c", WRITE_HALF, str(path)], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        assert temporary(path).read_bytes() == b"half"
        assert not is_abandoned(temporary(path))
        process.send_signal(signal.SIGKILL)
    assert is_abandoned(temporary(path))
    assert path.read_bytes() == b"old"
    write_bytes(path, b"n")
    assert path.read_bytes() == b"n"
    assert os.listdir(tmp_path) == ["x"]


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "x"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE_OFTEN, str(path), letter]) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
        time.sleep(0.001)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert seen <= {letter * 5000 for letter in (b"a", b"b", b"c")}
    assert os.listdir(tmp_path) == ["x"]


def test_a_published_object_is_not_emptied_by_the_next_writer(tmp_path: Path) -> None:
    """A writer that died between link and unlink leaves the temporary name on the published file."""
    path = tmp_path / "x"
    path.write_bytes(b"published")
    os.link(path, temporary(path))
    fd = files.open_alone(temporary(path))
    assert fd is not None
    os.close(fd)
    assert path.read_bytes() == b"published"
    assert temporary(path).read_bytes() == b""


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    assert held is not None
    assert lock_folder(tmp_path) is None
    os.close(held)
    again = lock_folder(tmp_path)
    assert again is not None
    os.close(again)
    with pytest.raises(FileNotFoundError):
        lock_folder(tmp_path / "nowhere")


def test_a_file_system_without_locks_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    held = lock_folder(tmp_path)
    assert held is not None
    os.close(held)
    write_bytes(tmp_path / "x", b"content")
    assert (tmp_path / "x").read_bytes() == b"content"
    (tmp_path / ".y.tmp").touch()
    assert not is_abandoned(tmp_path / ".y.tmp")


def test_files_that_belong_together_are_never_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename fails, and with whatever follows it."""
    rename = os.replace
    for number in range(4):
        write_together(tmp_path, {"a": "old", "b": "old", "c": "old"})
        renames = iter(range(9))

        def failing(source: Path, target: Path, fails: int = number, renames: Iterator[int] = renames) -> None:
            if next(renames) >= fails:
                raise OSError(errno.EROFS, "Read-only file system")
            rename(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with contextlib.suppress(OSError):
            write_together(tmp_path, {"a": "new", "b": "new", "c": "new"})
        monkeypatch.undo()
        assert {path.read_text() for path in tmp_path.iterdir()} <= {"new"}
        assert len(list(tmp_path.iterdir())) == number


@pytest.mark.parametrize("fails", [None, 0, 1])
def test_a_folder_takes_the_place_of_another_or_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int | None
) -> None:
    write_text(tmp_path / "site" / "old", "old")
    rename, renames = os.replace, iter(range(9))

    def failing(source: Path, target: Path) -> None:
        if next(renames) == fails:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with contextlib.suppress(OSError), making_folder(tmp_path / "site", replace=True) as filled:
        (filled / "new").write_text("new")
    assert os.listdir(tmp_path) == ["site"]
    assert os.listdir(tmp_path / "site") == ["new" if fails is None else "old"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_folder_whose_last_flush_fails_is_taken_back_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool, is_read_only: bool
) -> None:
    """A disk that lets nothing be taken back has the folder, whole: an error would bid the user to make another."""
    if replace:
        write_text(tmp_path / "site" / "old", "old")

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def last_flush(folder: Path) -> None:
        if folder == tmp_path:
            if is_read_only:
                monkeypatch.setattr(os, "replace", failing)
                monkeypatch.setattr(os, "unlink", failing)
            failing()

    monkeypatch.setattr(files, "sync_folder", last_flush)
    expected = contextlib.nullcontext() if is_read_only else pytest.raises(OSError, match="Read-only")
    with expected, making_folder(tmp_path / "site", replace=replace) as filled:
        for name in "ab":
            (filled / name).write_text(name)
    monkeypatch.undo()
    found = {path.name: sorted(os.listdir(path)) for path in tmp_path.iterdir()}
    if is_read_only:
        former = {".site.former.tmp": ["old"]} if replace else {}
        assert found == {"site": ["a", "b"], **former}
    else:
        assert found == ({"site": ["old"]} if replace else {})


def test_a_folder_whose_writer_died_between_two_renames_is_put_back(tmp_path: Path) -> None:
    write_text(tmp_path / ".site.former.tmp" / "old", "old")
    with contextlib.suppress(KeyError), making_folder(tmp_path / "site", replace=True):
        raise KeyError
    assert os.listdir(tmp_path) == ["site"]
    assert os.listdir(tmp_path / "site") == ["old"]
