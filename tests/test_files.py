"""files.py: whole files or none, no leftovers of the dead, the user's access rights, one process per locked folder."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minipeft import files
from minipeft.errors import OutputError
from minipeft.files import LOCK_FILE, check_writable, digests, is_locked, locked, replacing_folder, write_json_file

HOLD = """
import sys, time
from minipeft.files import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing ----------------------------------------------------------------------------------------------------------

def test_files_move_in_together_and_what_else_lies_there_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with replacing_folder(tmp_path) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "below").mkdir()
        (temporary / "below" / "b").write_text("new")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a", "below", "mine.txt"]


def test_a_file_that_is_being_written_has_another_ending(tmp_path):
    """So that who reads all .json files of a folder meets no half of one."""
    def write(temporary):
        temporary.touch()
        (name,) = names(tmp_path)
        assert name.startswith(".writing-") and not list(tmp_path.glob("*.json"))

    files._write_file(tmp_path / "x.json", write)
    assert names(tmp_path) == ["x.json"]


def test_on_an_error_nothing_moves_and_nothing_stays(tmp_path):
    with pytest.raises(OutputError, match="cannot write to"), replacing_folder(tmp_path) as temporary:
        (temporary / "a").write_text("half")
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.kind("0: files get the user's umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_access_rights_that_the_users_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "folder") as temporary:
            (temporary / "private").touch(0o600)  # as safetensors makes its files
        write_json_file(tmp_path / "results.json", {})
    finally:
        os.umask(before)
    for file in (tmp_path / "folder" / "private", tmp_path / "results.json"):
        assert file.stat().st_mode & 0o777 == mode


def leftover_of(process, folder):
    """What a process of this number leaves where it was killed while it wrote: a folder, and a file."""
    with replacing_folder(folder) as temporary:
        own = temporary.name
    made = own.replace(f"@{os.getpid()}-", f"@{process}-")
    (folder / made).mkdir()
    (folder / made / "half").write_text("half")
    (folder / f"{made}.json").write_text("half")
    return {made, f"{made}.json"}


@pytest.mark.kind("0: leftovers of killed processes")
def test_leftovers_of_the_dead_are_cleared_by_the_next_writer_and_those_of_the_living_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover_of(dead.pid, tmp_path)
    living = leftover_of(os.getppid(), tmp_path)
    foreign = {name.replace(".writing-", ".writing-another-host") for name in living}
    for name in foreign:
        (tmp_path / name).touch()
    write_json_file(tmp_path / "results.json", {})
    assert set(names(tmp_path)) == {"results.json"} | living | foreign


def test_a_leftover_that_this_user_may_not_delete_stays_and_hinders_no_writer(tmp_path, monkeypatch):
    """As another user's does in a folder like /tmp."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = leftover_of(dead.pid, tmp_path)

    def not_yours(path, *arguments, **more):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", not_yours)
    monkeypatch.setattr(os, "rmdir", not_yours)
    write_json_file(tmp_path / "results.json", {})
    assert set(names(tmp_path)) == {"results.json"} | left


@pytest.mark.parametrize("number", ["99999999999", "\u00b2"])
def test_a_leftover_whose_number_is_no_process_s_stays(tmp_path, number):
    left = leftover_of(number, tmp_path)
    write_json_file(tmp_path / "results.json", {})
    assert set(names(tmp_path)) == {"results.json"} | left


def test_a_check_of_a_folder_leaves_nothing_there(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_digests_name_the_files_directly_in_a_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "below").mkdir()
    # FIPS 180-4's own example.
    assert digests(tmp_path) == {"a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


def test_what_is_no_number_is_null_in_a_file(tmp_path):
    write_json_file(tmp_path / "x.json", {"a": [float("nan"), 1.5], "b": (float("inf"), "x", None, True)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": [None, "x", None, True]}


# --- the lock ---------------------------------------------------------------------------------------------------------

def hold(folder):
    """A process that holds a folder's lock, once it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.kind("0: two runs in one output folder")
def test_a_locked_folder_is_refused_in_one_line_that_names_the_process(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(OutputError, match=rf"in use by another run \(process {process.pid} on ") as caught:
            with locked(tmp_path):
                pytest.fail("locked twice")
        assert "\n" not in str(caught.value)
        with locked(tmp_path / "another"):
            pass
    finally:
        process.kill()
        process.wait()


@pytest.mark.kind("0: two runs in one output folder")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, how):
    process = hold(tmp_path)
    process.send_signal(how)
    process.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            with locked(tmp_path):
                assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
            break
        except OutputError:
            assert time.monotonic() < deadline
    assert names(tmp_path) == []


def test_a_lock_leaves_no_file_and_no_empty_folder_also_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="inside"), locked(tmp_path / "new" / "folder"):
        raise ValueError("inside")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["a link", "a link to nothing", "a folder", "a pipe"])
def test_a_lock_that_is_no_plain_file_is_refused_and_what_it_names_stays_as_it_is(tmp_path, kind):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    lock = tmp_path / "folder" / LOCK_FILE
    lock.parent.mkdir()
    {"a link": lambda: lock.symlink_to(mine), "a link to nothing": lambda: lock.symlink_to(tmp_path / "nothing"),
     "a folder": lock.mkdir, "a pipe": lambda: os.mkfifo(lock)}[kind]()
    with pytest.raises(OutputError, match=r"\.lock is no plain file, as a lock should be: delete it"):
        with locked(lock.parent):
            pytest.fail("locked")
    assert not is_locked(lock.parent)
    assert mine.read_text() == "mine" and not (tmp_path / "nothing").exists()


def test_a_lock_that_becomes_a_link_after_the_look_at_it_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "mine.txt")
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    with pytest.raises(OutputError, match="cannot write to"), locked(tmp_path):
        pytest.fail("locked")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_runs_go_on_without_and_are_told_once(tmp_path, monkeypatch, caplog, number):
    def no_locks(file, how):
        raise OSError(number, os.strerror(number))

    files._warn_of_no_lock.cache_clear()
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with locked(tmp_path):
                assert not is_locked(tmp_path)
    assert [record.getMessage() for record in caplog.records] == [
        f"this file system has no locks ({os.strerror(number)}): see to it that no two runs write into one folder"]
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_process_has_is_told_by_three_numbers(tmp_path, monkeypatch, number):
    (tmp_path / LOCK_FILE).write_text("process 1 on nowhere\n")

    def held(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", held)
    with pytest.raises(OutputError, match=r"in use by another run \(process 1 on nowhere\)"), locked(tmp_path):
        pytest.fail("locked")
    assert is_locked(tmp_path)


def test_a_disk_that_is_full_when_a_folder_is_locked_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, content):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.io, "FileIO", Full)
    with pytest.raises(OutputError, match="the disk is full"), locked(tmp_path / "new"):
        pytest.fail("locked")
    assert names(tmp_path) == []
