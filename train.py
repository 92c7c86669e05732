"""Trains what the pool needs: base, adapters, gates. Task folders in, a pool folder out.

    python train.py base --text FILE --model DIR                  a small Llama with its tokenizer
    python train.py adapters --model DIR --tasks DIR --pool DIR   a LoRA for each task, in one run
    python train.py gates --model DIR --tasks DIR --pool DIR      MeteoRA's gates over the pool
    python train.py retriever --model DIR --tasks DIR --pool DIR  LoraRetriever's encoder
    python train.py router --model DIR --tasks DIR --pool DIR     RAMoLE's router over the retrieved
    python train.py lorahub --model DIR --tasks DIR --pool DIR    LoraHub's weights for each task
    python train.py drlora --model DIR --tasks DIR --pool DIR     adapters and gates together, growing ranks
    python train.py samora --model DIR --tasks DIR --pool DIR     SAMoRA's experts for all tasks

The base stays frozen and in its dtype (except in `base`); trained weights are float32. `--resume`
continues a killed run, bit for bit as if it had not stopped. A run's options, log and checkpoint
are in MODEL/runs/base, POOL/runs/adapters, POOL/runs/lora_b, POOL/runs/gates_top2 and so on.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial

from common.endings import run_script
from common.options import parse_command
from methods import METHODS
from methods.drlora import DRLoRARun, check_drlora_options, train_drlora
from methods.joint import SAMPLING
from methods.lora_retriever import RetrieverRun, train_retriever
from methods.lorahub import LorahubRun, train_lorahub
from methods.ramole import RouterRun, train_router
from methods.samora import SamoraRun, train_samora
from parallel.processes import joined
from training.adapters import AdaptersRun, check_adapter_options, check_new_adapters, train_adapters
from training.base import BaseRun, check_sizes, train_base
from training.gates import GatesRun, train_gates

KINDS = {method.kind: method for method in METHODS if getattr(method, "kind", "")}  # kinds of gates

# {command: (the class of its options, the function that trains, another check of the options)}
COMMANDS = {
    "base": (BaseRun, train_base, check_sizes),
    "adapters": (AdaptersRun, partial(train_adapters, sampling=SAMPLING), check_adapter_options),
    "drlora": (DRLoRARun, train_drlora, check_drlora_options),
    "gates": (KINDS[GatesRun.kind].Run, partial(train_gates, kinds=KINDS), None),
    "lorahub": (LorahubRun, train_lorahub, None),
    "retriever": (RetrieverRun, train_retriever, None),
    "router": (RouterRun, train_router, None),
    "samora": (SamoraRun, train_samora, check_new_adapters),
}


def asked_kind() -> str:
    """What --kind is on the command line: a kind of gate may have options of its own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kind", nargs="?", default=GatesRun.kind)
    return parser.parse_known_args()[0].kind


def main() -> None:
    """The command: reads and checks a run's options, and trains."""
    commands = {name: cls for name, (cls, *_) in COMMANDS.items()}
    if (kind := asked_kind()) in KINDS:
        commands["gates"] = KINDS[kind].Run
    about = "Train a base, adapters, and what chooses among them. Two CPU cores train a model of 135M "
    about += "parameters on some 250 tokens a second: gates over five adapters, 60 steps of 10 examples, "
    about += "take 3 minutes."
    choices = {"kind": KINDS, "joint": ("", *SAMPLING)}
    command, args = parse_command(commands, description=about, choices=choices)
    _, train, check = COMMANDS[command]
    if check:
        check(args)
    with joined(args.device, getattr(args, "show_all", False)):
        print(json.dumps(asdict(args)), file=sys.stderr)
        train(args)


if __name__ == "__main__":
    run_script(main)
