"""Trains what the pool needs: base, adapters, gates. Task folders in, a pool folder out.

    python train.py base --text FILE --model DIR                        a small Llama from nothing, with its tokenizer
    python train.py adapters --model DIR --tasks DIR --pool DIR         a LoRA for each task, all in one run
    python train.py gates --model DIR --tasks DIR --pool DIR --top_k 2  MeteoRA's gates over the pool
    python train.py retriever --model DIR --tasks DIR --pool DIR        LoraRetriever's encoder
    python train.py router --model DIR --tasks DIR --pool DIR           RAMoLE's router over what is retrieved
    python train.py lorahub --model DIR --tasks DIR --pool DIR          LoraHub's weights for each task

The base stays in its dtype and frozen (but in `base`), what trains is float32. `--resume` goes on bit for bit where a
killed run stopped. A run's options, log and checkpoint are in MODEL/runs/base, POOL/runs/adapters, POOL/runs/lora_b,
POOL/runs/gates_top2 and so on.
"""

import json
import math
import sys
from dataclasses import asdict
from functools import partial

from common.files import InputError, run_script
from common.options import parse_command
from methods import METHODS
from methods.lora_retriever import RetrieverRun, train_retriever
from methods.lorahub import LorahubRun, train_lorahub
from methods.ramole import RouterRun, check_router_options, train_router
from training.adapters import AdaptersRun, check_adapter_options, train_adapters
from training.base import BASE_SIZES, BaseRun, check_heads, train_base
from training.gates import GatesRun, train_gates

KINDS = {method.kind: method for method in METHODS if getattr(method, "kind", "")}  # of gates

COMMANDS = {
    "base": (BaseRun, train_base),
    "adapters": (AdaptersRun, train_adapters),
    "gates": (GatesRun, partial(train_gates, kinds=KINDS)),
    "lorahub": (LorahubRun, train_lorahub),
    "retriever": (RetrieverRun, train_retriever),
    "router": (RouterRun, train_router),
}


def main():
    commands = {name: cls for name, (cls, _) in COMMANDS.items()}
    about = "Train a base, adapters, and what chooses among them."
    command, o = parse_command(commands, description=about, choices={"kind": KINDS})
    least = {"steps": 1, "batch_size": 1, "micro_tokens": 1, "save_every": 1, "lr": 0, "warmup": 0, "clip": 0}
    least |= {"seed": 0, "weight_decay": 0}
    least |= {"r": 1, "samples": 0} if command == "adapters" else {}
    least |= dict.fromkeys(("l2", "adapter_lr", "beta", "lm_weight"), 0) if command == "gates" else {}
    least |= {"gate_temperature": 1e-6} if command == "gates" else {}
    least |= dict.fromkeys(BASE_SIZES, 1) if command == "base" else {}
    least |= {"r": 1, "divisor": 0, "prior": 1e-6 if o.prior else 0} if command == "router" else {}
    least = {"steps": 1, "shots": 1, "l1": 0, "seed": 0} if command == "lorahub" else least
    if command == "retriever":
        least = {"steps": 0, "prompts": 3, "max_length": 32, "depth": 0, "lr": 0, "temperature": 1e-6, "seed": 0}
    for name, smallest in least.items():
        if not smallest <= getattr(o, name) < (2**63 if name == "seed" else math.inf):
            raise InputError(f"--{name} is {getattr(o, name)}, expected at least {smallest}")
    if command == "adapters":
        check_adapter_options(o)
    if command == "base":
        check_heads(o)
    if command == "router":
        check_router_options(o)
    print(json.dumps(asdict(o)), file=sys.stderr)
    COMMANDS[command][1](o)


if __name__ == "__main__":
    run_script(main)
