"""Runs trainers under torchrun; as a script, writes the gradients of each kind's first step.

torchrun --nproc_per_node N tests/helpers_parallel.py MODEL FOLDER    writes FOLDER/N.pt
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
# {what trains: (kind of run, its options besides those of helpers_training.options)}
RUNS = {
    "adapters": ("adapters", {}),
    "adapters late, in composites": ("adapters", {"late_start": 0.5, "composite": 0.6, "batch_size": 5}),
    "top1": ("top1", {}),
    "top2": ("top2", {}),
    "top2 and adapters": ("top2", {"adapters_too": "new"}),
    "smear": ("top2", {"kind": "smear", "batch_size": 5}),
    "router": ("router", {}),
    "base": ("base", {}),
    "base, one window": ("base", {"batch_size": 1}),
    "samora": ("samora", {}),
    "drlora": ("drlora", {}),
}


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
    from methods.drlora import DRLoRATraining
    from parallel.processes import gathered, joined, wait
    from training import loop

    model, folder = sys.argv[1:]
    found = {}
    real = loop.add_gradients

    def look(params):
        params = list(params)
        real(params)
        found[name] = [param.grad.clone() for param in params]

    after_backward = DRLoRATraining.after_backward

    def after(training, step):
        after_backward(training, step)
        found["use of drlora's adapters"] = [training.f.clone()]

    DRLoRATraining.after_backward = after
    loop.add_gradients = look
    loop.leave = wait  # the others go on to the next kind
    with joined("cpu"):
        for name, (kind, more) in RUNS.items():
            o = None
            if rank() == 0:  # it writes the tasks and the pool
                out = Path(folder) / str(count()) / name / "out"
                if "adapters_too" in more:
                    more = more | {"adapters_too": str(out.parent / "new")}
                o = replace(options(kind, model, out), steps=1, **more)
                if kind == "samora":
                    write_random_pool(out, model)
            run(gathered(o)[0])
        several = count()
        first = rank() == 0
    if first:
        torch.save(found, f"{folder}/{several}.pt")


if __name__ == "__main__":
    main()
