"""Runs the program's commands, each in a process of its own with limits of memory and time.

The processes are forked from one that has imported torch and the program, so that a command costs
some hundredths of a second. Its output goes to files, so that no amount of it stops anybody.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("generate.py", "train.py", "eval.py", "bench.py")
CPU_SECONDS = 10  # of a command: more is a hang
WALL_SECONDS = 30  # for what sleeps, or has processes of its own
MEMORY = 3 << 30  # bytes of address space, beyond what the libraries take
OUTPUT = 1 << 28  # bytes of any file
READ = 1 << 20  # bytes of the output that are looked at

# Runs in the root that is tested, with its folder first on sys.path.
SERVER = """
import gc, json, os, resource, runpy, signal, sys, time, traceback
root, scripts, cpu, wall, memory, output = json.loads(sys.argv[1])
sys.path[0] = root
sys.modules |= dict.fromkeys(("transformers", "peft", "huggingface_hub", "sentence_transformers"))
if scripts:
    import jinja2.sandbox, numpy, safetensors.torch, sentencepiece, tokenizers, torch, tqdm
    with torch.device("meta"):
        torch.nn.Linear(2, 3), torch.nn.Embedding(5, 7)  # the first time imports sympy: a second
for script in scripts:  # imports the modules of the program; nothing runs, as none is __main__
    runpy.run_path(f"{root}/{script}", run_name="warm")
gc.freeze()  # what is imported stays shared with the forked processes
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def limit():
    signal.alarm(wall)
    for what, most in (("CPU", cpu), ("AS", taken + memory), ("FSIZE", output), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most + (what == "CPU")))

def serve(argv, folder, *files):
    os.setpgid(0, 0)
    os.chdir(folder)
    for number, name in enumerate(files):
        os.dup2(os.open(name, os.O_RDWR), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    sys.argv, code = argv, 0
    limit()
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        code = traceback.print_exc() or 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)

for line in sys.stdin:
    if not (child := os.fork()):
        serve(*json.loads(line))
    begin = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.killpg(child, signal.SIGKILL)  # what it left running
    except ProcessLookupError:
        pass
    print(json.dumps([code, time.monotonic() - begin]), flush=True)
"""


@dataclass
class Done:
    """What a command printed and how it ended; `code` below 0: by that signal."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0


class Server:
    """Runs commands of the checkout `root` one after the other; `scripts` are what they may be."""

    def __init__(self, root: Path | str = ROOT, scripts=SCRIPTS, cpu=CPU_SECONDS, wall=WALL_SECONDS):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "COLUMNS": "100"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        self.root = Path(root)
        given = json.dumps([str(root), list(scripts), cpu, wall, MEMORY, OUTPUT])
        line = [sys.executable, "-c", SERVER, given]
        self.process = subprocess.Popen(line, stdin=-1, stdout=-1, text=True, env=environment)

    def run(self, argv: list[str], folder: Path, stdin: str = "") -> Done:
        """`python SCRIPT ARGS...` in `folder`, the script being one of the root's."""
        files = [folder / f".{name}" for name in ("in", "out", "err")]
        for file, text in zip(files, (stdin, "", ""), strict=True):
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
        script, *rest = argv
        request = [[str(self.root / script), *rest], str(folder), *map(str, files)]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        stdout, stderr = map(_head, files[1:])
        return Done(code, stdout, stderr, seconds)

    def close(self) -> None:
        """Ends the process that commands are forked from."""
        self.process.kill()
        self.process.wait()


def _head(file):
    with open(file, "rb") as opened:
        return opened.read(READ).decode("utf-8", "surrogateescape")
