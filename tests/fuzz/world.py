"""The undamaged folder that cases are copied from: models, adapters, a pool with every part, tasks,
interrupted runs of train.py and eval.py."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

import eval
from common.files import write_json, write_jsonl
from evaluation import answers
from evaluation.answers import AnswerCache
from fuzz.plan import EVAL
from fuzz.tensors import join, sort_metadata, split
from helpers_methods import write_every_part
from helpers_models import tokenizer_bytes, write_llama
from helpers_tokenizers import write_tokenizer
from helpers_training import killed_at_write, options
from methods.lora_retriever import RetrieverRun, train_retriever

CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
BYTES = slice(3, 259)  # the tokens <0x00> to <0xFF> of both tokenizers
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def write_world(folder: Path) -> Path:
    """Writes everything into `folder`; all paths in it are relative to it."""
    small = write_quiet_llama(folder / "small", 0)
    (small / "tokenizer.model").write_bytes(tokenizer_bytes())
    write_json(small / "special_tokens_map.json", SPECIAL)
    write_json(small / "added_tokens.json", {"<pad>": 330})
    hf = write_quiet_llama(folder / "hf", 1)
    write_tokenizer(hf, "llama2", **SPECIAL, chat_template=CHAT, add_bos_token=True, legacy=True)
    write_json(hf / "special_tokens_map.json", SPECIAL)
    write_json(hf / "generation_config.json", {"eos_token_id": [2, 3], "do_sample": True, "top_p": 0.5})
    write_shards(hf, folder / "shards")
    write_every_part(folder, small)
    write_plain_adapter(folder / "pool" / "adapters" / "bee", folder / "bee")
    write_lines(folder)
    shutil.rmtree(folder / "pool" / "runs")  # it names the folder that it was written in
    with _inside(folder):
        write_runs(folder)
        for file in folder.rglob("*.safetensors"):
            sort_metadata(file)
        write_scores(folder / "scores")
    return folder


@contextlib.contextmanager
def _inside(folder):
    here = os.getcwd()
    os.chdir(folder)  # the runs keep the paths that they were given
    try:
        yield
    finally:
        os.chdir(here)


def write_quiet_llama(folder: Path, seed: int) -> Path:
    """A random Llama that never says a byte: control characters in what the commands print then come
    from somewhere else."""
    write_llama(folder, seed, num_hidden_layers=2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][BYTES] *= 0.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_shards(model: Path, folder: Path) -> None:
    """The model in two files and an index."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {}
    for number, name in enumerate(sorted(tensors)):
        shards.setdefault(f"model-0000{number % 2 + 1}-of-00002.safetensors", []).append(name)
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_plain_adapter(adapter: Path, folder: Path) -> None:
    """A copy as PEFT writes it: without this project's metadata, which binds the config."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    header, body = split(file.read_bytes())
    header["__metadata__"] = {"format": "pt"}
    file.write_bytes(join(json.dumps(header), body))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"layers.1.mlp.up_proj": config["r"]}, "alpha_pattern": {}}
    write_json(folder / "adapter_config.json", config)


def write_lines(folder: Path) -> None:
    """Examples and prompts, as task folders and as one file; samples; a text to train a base on."""
    lines = []
    for name in ("ant", "bee", "cat"):
        rows = [{"prompt": f"the {name} {j}", "response": "lazy dog"} for j in range(4)]
        write_json(folder / "questions" / name / "task.json", {"metric": "exact_match"})
        write_jsonl(folder / "questions" / name / "train.jsonl", rows)
        write_jsonl(folder / "questions" / name / "test.jsonl", rows[:2])
        lines += [{"adapter": name} | row for row in rows]
    write_jsonl(folder / "lines.jsonl", lines)
    write_jsonl(folder / "samples.jsonl", [{"prompt": "the ant"}, {"prompt": "quick"}])
    asked = [{"prompt": "the fox", "method": "base", "stop": ["zz"]}, {"prompt": "jumps"}]
    write_jsonl(folder / "prompts.jsonl", asked)
    write_benchmarks(folder / "benchmarks")
    (folder / "text.txt").write_text("the quick brown fox\n\njumps over the lazy dog\n\n" * 40)


def write_benchmarks(folder: Path) -> None:
    """What tasks/bbh.py, bio.py and gsm8k.py read of a checkout, of all three in one folder."""
    count = range(9)
    examples = [{"input": f"is {j} even?", "target": "yes"} for j in count]
    write_json(folder / "bbh" / "parity.json", {"canary": "", "examples": examples})
    bio = [{"no": f"A_{j}", "question": f"q {j}", "answer": "ACGUA", "eval": "Recovery rate"} for j in count]
    write_json(folder / "Bio-Benchmark" / "RNA" / "folding.json", {"RNA": bio})
    for name in ("train", "test"):
        lines = [{"question": f"{name} {j}", "answer": "1+1=<<1+1=2>>2\n#### 2"} for j in count]
        write_jsonl(folder / "grade_school_math" / "data" / f"{name}.jsonl", lines)


def write_runs(folder: Path) -> None:
    """A retriever, and runs of train.py that were killed after a checkpoint."""
    train_retriever(RetrieverRun("small", "questions", "pool", prompts=3, steps=1))
    for kind, number in (("adapters", 3), ("top2", 3), ("base", 5)):
        os.makedirs(kind)
        with pytest.MonkeyPatch.context() as patch:
            assert killed_at_write(patch, options(kind, "small", f"{kind}/out"), number, after=True)
    assert len(list(folder.rglob("checkpoint.safetensors"))) == 3


def write_scores(folder: Path) -> None:
    """What a run of eval.py writes, and the answers that it kept in case it is stopped."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(AnswerCache, "remove", lambda self: None)
        patch.setattr(answers, "time", SimpleNamespace(perf_counter=lambda: 0.5))  # the same each time
        patch.setattr(sys, "argv", [*EVAL, "--tasks", "questions", "--out", folder.name])
        eval.main()
