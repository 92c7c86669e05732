"""Runs the repository's commands as a user would, in processes forked from one that has imported
the libraries."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is later

# Scripts as processes with standard streams of their own, forked from one that has imported the
# libraries.
WARM = """
import json, os, runpy, signal, sys, traceback
import jinja2.sandbox, numpy, safetensors.torch, sentencepiece, tokenizers, torch, tqdm
with torch.device("meta"):
    torch.nn.Linear(2, 3), torch.nn.Embedding(5, 7)  # the first time imports sympy: a second
for line in sys.stdin:
    argv, cwd, environment, *files = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.chdir(cwd)
        os.environ.update(environment)
        for number, name in enumerate(files):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        sys.argv, code = argv, 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}
_own = threading.local()


def warm(argv, stdin=b"", cwd=None, environment=None):
    """`python SCRIPT ARGS...` in a tenth of the time of a fresh interpreter; CompletedProcess with
    text output. From any thread."""
    if not hasattr(_own, "server"):  # it ends with us, as its stdin does
        _own.server = subprocess.Popen(
            [sys.executable, "-c", WARM], stdin=-1, stdout=-1, text=True, env=ENVIRONMENT
        )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file, data in zip(files, (stdin, b"", b""), strict=True):
            file.write_bytes(data)
        request = [argv, str(cwd or Path.cwd()), environment or {}, *map(str, files)]
        _own.server.stdin.write(json.dumps(request) + "\n")
        _own.server.stdin.flush()
        code = int(_own.server.stdout.readline())
        return subprocess.CompletedProcess(argv, code, *(file.read_bytes().decode() for file in files[1:]))


def command(*args, stdin="", cwd=None, environment=None):
    """Runs `python SCRIPT ARGS...` of the repository, with more variables in its `environment`;
    returns the CompletedProcess with text output."""
    script, *rest = map(str, args)
    return warm([str(ROOT / script), *rest], stdin.encode(), cwd, environment)


def repository_copy(folder):
    """The repository in `folder`, by links, so that a command may write beside what it finds."""
    for file in ROOT.iterdir():
        if not file.name.startswith(".") and file.name not in ("out", "runs", "tests"):
            (folder / file.name).symlink_to(file)


def assert_refused(done, *words):
    """Bad input: exit status 2, nothing on stdout, one line on stderr besides warnings and what is
    in use, naming each of `words`."""
    besides = ("warning:", "method:", "template:")
    lines = [y for y in done.stderr.splitlines() if not y.startswith(besides)]
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def python(code, cwd=None):
    """`python -c CODE` with the repository on its path; CompletedProcess with text output."""
    environment = ENVIRONMENT | {"PYTHONDONTWRITEBYTECODE": "1"}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=cwd, timeout=200)
