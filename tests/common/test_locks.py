"""One process at a time in a folder: who is told what, and what a kill leaves."""

import fcntl
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from common import locks
from common.files import InputError
from common.locks import NAME, alone
from helpers_commands import ENVIRONMENT

HOLDER = """
import sys, time
from common.locks import alone
with alone(sys.argv[1]):
    print("in", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is inside alone(tmp_path / "run")."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_told_who_is_there(holder, tmp_path):
    """Two trainers in one folder overwrite each other's checkpoints, and each ends with some of the
    other's steps."""
    with pytest.raises(InputError) as refusal, alone(tmp_path / "run"):
        pytest.fail("there are two")
    since = time.strftime("%Y-%m-%d")
    pattern = (
        rf"{tmp_path}/run: process {holder.pid} on \S+ \(since {since} \d\d:\d\d:\d\d\) is at work here: .*"
    )
    assert re.fullmatch(pattern, str(refusal.value))
    with alone(tmp_path / "other"):
        pass


def test_a_kill_leaves_no_lock(holder, tmp_path):
    """With a file that says "locked" a kill would leave a folder that nobody can use until it is
    found and removed by hand."""
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()
    with alone(tmp_path / "run"):
        assert f"process {os.getpid()} " in (tmp_path / "run" / NAME).read_text()
    assert not (tmp_path / "run" / NAME).exists()


def test_nothing_is_left(tmp_path):
    """A mistyped command must not leave empty folders; what was there, or has come, stays."""
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        with alone(tmp_path / "empty" / "a" / "b"):
            pass
        with pytest.raises(ZeroDivisionError), alone(tmp_path / "empty" / "a"):
            raise ZeroDivisionError
    assert os.listdir(tmp_path / "empty") == []
    with alone(tmp_path / "empty" / "a" / "b"):
        (tmp_path / "empty" / "a" / "work").write_text("")
    assert os.listdir(tmp_path / "empty" / "a") == ["work"]


def test_a_planted_link_is_refused(tmp_path):
    """The lock is written into: through a link that would empty another file."""
    (tmp_path / "target").write_text("mine")
    (tmp_path / NAME).symlink_to(tmp_path / "target")
    with pytest.raises(InputError, match=NAME), alone(tmp_path):
        pass
    assert (tmp_path / "target").read_text() == "mine"


def test_never_two(tmp_path):
    """The first removes the file as it leaves: who has opened it just before would lock a file that
    is gone, while a third makes a new one."""
    inside, most, entered = [], [], []

    def enter():
        until = time.monotonic() + 2
        while time.monotonic() < until:
            try:
                with alone(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    entered.append(threading.get_ident())
                    time.sleep(0.0001)
                    inside.pop()
            except InputError:
                time.sleep(0.0001)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(set(entered)) == 4


def test_a_lock_on_a_file_that_is_gone(tmp_path, monkeypatch):
    """The same moment, made to happen."""
    flock, locked = fcntl.flock, []

    def late(file, how):
        if not locked:  # its holder leaves between our open() and our lock
            (tmp_path / NAME).unlink()
        locked.append(file)
        flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with alone(tmp_path):
        assert len(locked) == 2 and os.path.samestat(os.fstat(locked[1].fileno()), os.stat(tmp_path / NAME))


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """Some network file systems have none: training there must go on, and say what isn't held."""

    def missing(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", missing)
    with alone(tmp_path):
        pass
    assert re.fullmatch(r"warning: \S+: no lock \(Function not implemented\): .*\n", capsys.readouterr().err)
