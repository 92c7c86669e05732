"""Runs trainers under torchrun; as a script, writes the gradients of each kind's first step.

torchrun --nproc_per_node N tests/helpers_parallel.py MODEL FOLDER    writes FOLDER/N.pt
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
KINDS = ("adapters", "top1", "top2", "router", "base", "samora", "drlora")


def torchrun_line(count, *argv):
    """`torchrun --nproc_per_node COUNT -- ARGV...`, on a port of its own."""
    options = [str(count), "--rdzv_endpoint=localhost:0", "--rdzv_backend=c10d"]
    return [*TORCHRUN, *options, "--", *map(str, argv)]  # --: else --r would be torchrun's, abbreviated


def torchrun(count, *argv):
    """The same, run: a CompletedProcess with text output."""
    from helpers_commands import ENVIRONMENT

    line = torchrun_line(count, *argv)
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)


def main():
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    from common.processes import count, rank
    from helpers_training import options, run, write_random_pool
    from parallel.processes import gathered, joined, wait
    from training import loop

    model, folder = sys.argv[1:]
    found = {}
    real = loop.add_gradients

    def look(params):
        params = list(params)
        real(params)
        found[kind] = [param.grad.clone() for param in params]

    loop.add_gradients = look
    loop.leave = wait  # the others go on to the next kind
    with joined("cpu"):
        for kind in KINDS:
            o = None
            if rank() == 0:  # it writes the tasks and the pool
                out = Path(folder) / str(count()) / kind / "out"
                o = options(kind, model, out, steps=1)
                if kind == "samora":
                    write_random_pool(out, model)
            run(gathered(o)[0])
    if rank() == 0:
        torch.save(found, f"{folder}/{count()}.pt")


if __name__ == "__main__":
    main()
