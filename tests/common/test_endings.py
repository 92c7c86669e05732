"""How a command ends: one line and an exit status, whatever happened and whenever."""

import os
import signal
import subprocess
import sys

import pytest

from common.endings import run_script
from common.files import InputError
from helpers_commands import ROOT


def ends(main, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    return ended.value.code, capsys.readouterr()


def test_statuses(capsys):
    """Without it bad input can't be told from success in a shell script, or Ctrl-C prints a
    traceback."""

    def main(error):
        def run():
            print("part")
            raise error

        return run

    code, seen = ends(main(InputError("config.json: missing")), capsys)
    assert (code, seen.out, seen.err) == (2, "part\n", "error: config.json: missing\n")
    code, seen = ends(main(KeyboardInterrupt()), capsys)
    assert (code, seen.err) == (128 + signal.SIGINT, "interrupted\n")
    code, seen = ends(main(OSError(28, "No space left on device", "/disk/w")), capsys)
    assert (code, seen.err) == (2, "error: /disk/w: No space left on device\n")
    run_script(lambda: print("fine"))
    assert capsys.readouterr() == ("fine\n", "")


def test_bugs_stay_loud():
    """Without it a bug of ours would be shown as the user's bad input."""
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def script(code, env=None, **options):
    code = f"from common.endings import run_script\n{code}\nrun_script(main)"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_character_that_the_terminal_lacks():
    """Without it a Spanish word ends in a traceback where the locale is C."""
    process = script(
        "def main():\n    print('rat\\u00f3n')", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"}
    )
    assert process.communicate(timeout=100) == ("rat\\xf3n\n", "") and process.returncode == 0


def test_closed_pipe():
    """Without it `generate.py ... | head -1` ends in a traceback or in 'Exception ignored'."""
    reader, writer = os.pipe()
    os.close(reader)
    process = script("def main():\n    print('x' * 9)", stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=100)[1] == "" and process.returncode == 128 + signal.SIGPIPE


def test_full_disk():
    """Without it an answer redirected to a full disk is lost in a traceback, or in silence."""
    with open("/dev/full", "w") as full:
        process = script("def main():\n    print('x' * 9)", stdout=full)
        err = process.communicate(timeout=100)[1]
    assert process.returncode == 2, (process.returncode, err)
    assert err == "error: standard output: No space left on device\n"


def test_closed_streams_are_not_a_traceback(tmp_path):
    """A daemon or a cron job may start us with no standard output at all."""
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom common.endings import run_script\n"
    code += "run_script(lambda: print(1))"
    done = subprocess.run(
        f'exec "{sys.executable}" -c "$CODE" >&- <&-', shell=True, env=os.environ | {"CODE": code}
    )
    assert done.returncode == 0
