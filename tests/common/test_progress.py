"""Progress of long steps: whole lines where no terminal shows a bar, a bar where one does."""

import os
import pty
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from common import progress
from common.progress import clock, track
from helpers_commands import ENVIRONMENT


@pytest.fixture
def steps(monkeypatch, capfd):
    """run(seconds of each step) -> what track() writes to standard error meanwhile."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def run(seconds, fails=None):
        try:
            for step in track(range(len(seconds)), "steps"):
                now[0] += seconds[step]
                if step == fails:
                    raise KeyError(step)
        except KeyError:
            pass
        out, err = capfd.readouterr()
        assert out == ""
        return err

    return run


def test_a_log_file_gets_a_line_every_ten_seconds(steps):
    """Without it a log of a night's training is one line of a megabyte, or nothing until its end."""
    lines = steps([2.0] * 23).splitlines()
    assert lines[0] == "steps: 3/23, 0:40 left"  # after 6 seconds
    assert lines[1:-1] == ["steps: 8/23, 0:30 left", "steps: 13/23, 0:20 left", "steps: 18/23, 0:10 left"]
    assert lines[-1] == "steps: 23/23 in 0:46"


@pytest.mark.parametrize("seconds", [[], [4.9], [0.1] * 47])
def test_what_is_quick_shows_nothing(steps, seconds):
    """Without it every command prints lines that nobody needed, and --json users see them as errors."""
    assert steps(seconds) == ""


def test_one_long_step_shows_one_line(steps):
    """Without it a step that counted nothing until its end divides by zero or is told twice."""
    assert steps([7325.0]) == "steps: 1/1 in 2:02:05\n"
    assert steps([1.0, 11.0]) == "steps: 2/2 in 0:12\n"


def test_an_error_is_the_last_line(steps):
    """Without it a line of progress follows the line that says what went wrong."""
    assert steps([6.0, 6.0, 6.0], fails=1).splitlines() == ["steps: 1/3, 0:12 left"]


def test_a_resumed_run_counts_from_where_it_was(monkeypatch, capfd):
    """Without it the time that is left is computed as if the earlier run's steps had cost nothing."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress.progress("gates_top2", 300, done=290) as bar:
        now[0] = 20.0
        bar.set_postfix_str("loss 0.51", refresh=False)
        bar.update(2)
    first, last = capfd.readouterr().err.splitlines()
    assert first == "gates_top2: 292/300, 1:20 left, loss 0.51"  # 8 steps of 10 seconds
    assert last == "gates_top2: 292/300 in 0:20, loss 0.51"


def test_clock():
    """Without it 59.7 seconds are 0:60."""
    assert list(map(clock, (0.2, 59.7, 130, 3599.6))) == ["0:00", "1:00", "2:10", "1:00:00"]


def test_a_terminal_gets_a_bar():
    """Without it a terminal scrolls, or the bar lands on standard output among the answers."""
    code = (
        "import common.progress as p, time; p.BEGIN = 0\n"
        "for step in p.track(range(5), 'steps'): time.sleep(0.3)\n"
        "print('the answer')"
    )
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env=ENVIRONMENT, timeout=100
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.stdout == b"the answer\n"
    assert "\rsteps:" in shown and "5/5" in shown and shown.endswith("\r\n")
