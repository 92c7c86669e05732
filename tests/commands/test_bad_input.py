"""Bad input gets one clear line and exit status 2, through the real commands: every row of the
promise, tried.

A row builds the broken input and says which words the line must hold. The commands of the selected
rows run two at a time, each in a process of its own, and every test then looks at its own result.
"""

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.files import InputError
from common.tensors import read_safetensors, write_safetensors
from common.tokenizer import Tokenizer
from helpers_commands import ENVIRONMENT, ROOT, assert_refused, warm
from helpers_models import random_adapter, tokenizer_bytes, write_adapters
from model import load_llama
from moe_lora import MeteoraGate
from pool.adapters import linear_shapes, load_adapter, save_adapter
from pool.gate_files import save_gates
from pool.slots import Pool

WEIGHTS, TENSORS = "model.safetensors", "adapter_model.safetensors"
Q1, PREFIX = "model.layers.1.self_attn.q_proj", "base_model.model."
ROWS = {}  # "table/row" -> (builder, the row's own arguments)


def table(name, rows, build):
    """Registers a table: build(kit, *row) -> (arguments, words of the one line), run once for all
    tests."""
    ROWS.update({f"{name}/{row}": (build, args) for row, args in rows.items()})
    return pytest.mark.parametrize("row", [f"{name}/{row}" for row in rows])


class Kit:
    """A good model and a good adapter, and fresh copies of them to break."""

    def __init__(self, root, model):
        self.root, self.model, self.count = root, model, itertools.count()
        self.adapter = write_adapters(root / "good", load_llama(model), ["spelling"])["spelling"]

    def folder(self, name="folder"):
        return self.root / str(next(self.count)) / name

    def edit(self, file, change):
        """`change` is a dict merged into a JSON file (None removes a field), or bytes or text
        instead of the file."""
        if isinstance(change, dict):
            merged = json.loads(file.read_text()) | change
            file.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
        else:
            file.write_bytes(change.encode() if isinstance(change, str) else change)
        return file

    def a_model(self, **changes):
        """A copy of the model named like it; changes: file name with __ for its dot -> see edit."""
        folder = shutil.copytree(self.model, self.folder(self.model.name))
        for name, change in changes.items():
            self.edit(folder / name.replace("__", "."), change)
        return folder

    def an_adapter(self, **config):
        folder = shutil.copytree(self.adapter, self.folder("spelling"))
        self.edit(folder / "adapter_config.json", config)
        return folder

    def a_pool(self, names=("spelling", "counting"), gates=True):
        """A pool with top-2 gates, as train.py writes it."""
        base, folder = load_llama(self.model), self.folder("pool")
        paths = write_adapters(folder / "adapters", base, names)
        (folder / "pool.json").write_text(json.dumps({"adapters": sorted(names), "template": "{prompt}"}))
        pool = Pool.of([load_adapter(path) for path in paths.values()], linear_shapes(base))
        if gates:
            made = {path: MeteoraGate(torch.randn(len(names), A.shape[2]), 2) for path, A in pool.A.items()}
            save_gates(
                folder / "gates" / "meteora_top2.safetensors", made, pool, 2, list(names), base.fingerprint()
            )
        return folder

    def tasks(self, **changes):
        """A folder of one task, `toy`; changes: file name with __ for its dot -> the bytes or text
        instead."""
        folder = self.folder("tasks")
        (folder / "toy").mkdir(parents=True)
        row = '{"prompt": "2+2", "response": "4"}\n'
        for name, text in {
            "task__json": '{"metric": "exact_match"}',
            "train__jsonl": row,
            "test__jsonl": row,
        }.items():
            self.edit(folder / "toy" / name.replace("__", "."), changes.get(name, text))
        return folder


def generate(model, *more, prompt="the fox"):
    return ["generate.py", "--model", model, "--prompt", prompt, "--max_new_tokens", "3", *more]


def train(kit, tasks, *more):
    line = ["train.py", "adapters", "--model", kit.model, "--tasks", tasks, "--pool", kit.folder()]
    return [*line, "--steps", "1", *more]


def run_row(kit, row, cold):
    """(CompletedProcess, words) of a row: cold in a fresh interpreter, or as conftest.warm does."""
    build, own = ROWS[row]
    (script, *rest), words, *stdin = build(kit, *own)
    argv = [str(ROOT / script), *(os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in rest)]
    given = stdin[0] if stdin else b""
    if not cold:
        return warm(argv, given), words
    done = subprocess.run(
        [sys.executable, *argv], input=given, capture_output=True, env=ENVIRONMENT, timeout=300
    )
    return subprocess.CompletedProcess(
        argv, done.returncode, done.stdout.decode(), done.stderr.decode()
    ), words


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory, small_model):
    """{row: a future of (CompletedProcess, words)} for the rows of the selected tests; each table's
    first is cold."""
    picked = [item.callspec.params.get("row") for item in request.session.items if hasattr(item, "callspec")]
    first = {}
    for row in ROWS:
        first.setdefault(row.partition("/")[0], row)
    kit = Kit(tmp_path_factory.mktemp("bad"), small_model)
    with ThreadPoolExecutor(2) as workers:
        yield {row: workers.submit(run_row, kit, row, row in first.values()) for row in picked if row in ROWS}
        workers.shutdown(cancel_futures=True)


def refused(outcomes, row):
    done, words = outcomes[row].result()
    printed = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(
        line for line in printed if not line.startswith('{"model": ')
    )  # train.py shows its options
    assert_refused(done, *words)
    assert done.stdout == "", done.stdout
    return done


# Weight files -------------------------------------------------------------------------------------

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 99\n"
)
LENGTH = (1 << 20).to_bytes(8, "little")
DAMAGE = {
    "cut in the tensors": (
        lambda whole: whole[:-100],
        lambda whole: [len(whole) - 100, len(whole), "bytes present"],
    ),
    "cut in the header": (lambda whole: whole[:50], lambda whole: ["50 bytes present", _header(whole)]),
    "empty": (lambda whole: b"", lambda whole: ["0 bytes present"]),
    "bytes appended": (lambda whole: whole + b"\0\0\0", lambda whole: [len(whole) + 3, len(whole)]),
    "git lfs pointer": (lambda whole: POINTER, lambda whole: ["Git LFS pointer", "git lfs pull"]),
    "html page": (
        lambda whole: b"\n<!DOCTYPE html><html>404",
        lambda whole: ["HTML page", "fetch the file again"],
    ),
    "zip": (lambda whole: b"PK\x03\x04" + whole, lambda whole: ["zip archive", "convert"]),
    "pickle": (lambda whole: pickle.dumps({"w": [1.0] * 99}, 4), lambda whole: ["pickle", "convert"]),
    "another file": (lambda whole: (9).to_bytes(8, "little") + b"no tensor" + whole, lambda whole: ["JSON"]),
    "another json": (
        lambda whole: (9).to_bytes(8, "little") + b'{"a": {}}',
        lambda whole: ["not a safetensors file"],
    ),
}


def _header(whole):
    return 8 + int.from_bytes(whole[:8], "little")


def damaged(kit, side, harm, words):
    folder = kit.a_model() if side == "base" else kit.an_adapter()
    file = folder / (WEIGHTS if side == "base" else TENSORS)
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    args = generate(folder) if side == "base" else generate(kit.model, "--adapter", f"a={folder}")
    return args, [file, *words(whole)]


@table(
    "damage",
    {f"{side}: {n}": (side, *how) for side in ("base", "adapter") for n, how in DAMAGE.items()},
    damaged,
)
def test_damaged_weights(outcomes, row):
    """Without it a half-finished download ends in a traceback, or a pickle under that name is taken
    for weights."""
    refused(outcomes, row)


def base_tensors(kit, change, words):
    folder = kit.a_model()
    tensors, _ = read_safetensors(folder / WEIGHTS)
    change(tensors)
    write_safetensors(folder / WEIGHTS, tensors)
    return generate(folder), words


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def spoil(name, value):
    def change(tensors):
        tensors[name][1, 1] = value

    return change


def in_float8(tensors):
    tensors.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()})


UP = "model.layers.2.mlp.up_proj.weight"
BASE_TENSORS = {
    "missing": (lambda t: t.pop(UP), [UP, "missing", "intermediate_size"]),
    "wrong shape": (put(UP, torch.ones(71, 44)), [WEIGHTS, UP, "(71, 44)", "(67, 44)", "intermediate_size"]),
    "unexpected": (put("model.layers.3.mlp.up_proj.weight", torch.ones(67, 44)),
                   [WEIGHTS, "unexpected", "model.layers.3.mlp.up_proj.weight"]),
    "bias": (put(f"{Q1}.bias", torch.ones(24)), [WEIGHTS, "unexpected", f"{Q1}.bias", "attention_bias"]),
    "nan": (spoil(UP, float("nan")), [WEIGHTS, UP, "NaN"]),
    "inf": (spoil(UP, float("-inf")), [WEIGHTS, UP, "Inf"]),
    "integers": (put(UP, torch.ones(67, 44, dtype=torch.int8)), [WEIGHTS, UP, "int8"]),
    "all float8": (in_float8, [WEIGHTS, "float8"]),
}  # fmt: skip


@table("base tensors", BASE_TENSORS, base_tensors)
def test_base_tensors(outcomes, row):
    """Without it a checkpoint that doesn't fit its config answers nonsense (silu(-inf) is a finite
    0)."""
    refused(outcomes, row)


def shards(kit, text):
    folder = kit.a_model()
    (folder / WEIGHTS).rename(folder / "model-00002-of-00003.safetensors")
    names = [f"model-0000{j}-of-00003.safetensors" for j in (1, 2, 3)]
    index = folder / "model.safetensors.index.json"
    index.write_text(text or json.dumps({"weight_map": {f"t{j}": name for j, name in enumerate(names)}}))
    return generate(folder), [
        index,
        *(["line 2"] if "\n" in text else ["weight_map"] if text else [names[0], names[2]]),
    ]


def only_bin(kit, side):
    folder = kit.a_model() if side == "base" else kit.an_adapter()
    name, other = (WEIGHTS, "pytorch_model.bin") if side == "base" else (TENSORS, "adapter_model.bin")
    (folder / name).unlink()
    with zipfile.ZipFile(folder / other, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(1))
    args = generate(folder) if side == "base" else generate(kit.model, "--adapter", f"a={folder}")
    return args, [folder, ".bin", "pickle", "save"]


@table(
    "shards",
    {
        "two missing": ("",),
        "bad json": ('{\n"weight_map"',),
        "no map": ('{"weight_map": {"a": 1}}',),
        "outside": ('{"weight_map": {"a": "../a.safetensors"}}',),
    },
    shards,
)
def test_shards(outcomes, row):
    """Without it a user with two shards missing downloads one, starts again and learns of the next."""
    refused(outcomes, row)


@table("bin", {"base": ("base",), "adapter": ("adapter",)}, only_bin)
def test_only_bin(outcomes, row):
    """Without it loading somebody's .bin runs whatever code its pickle holds."""
    refused(outcomes, row)


# The base's config and tokenizer ------------------------------------------------------------------


def base_file(kit, name, change, words):
    folder = kit.a_model(**{name: change})
    return generate(folder), [folder / name.replace("__", "."), *words]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
BASE_CONFIG = {
    "another model": ({"model_type": "qwen3"}, ["model_type", "qwen3", "llama"]),
    "heads": ({"num_attention_heads": 3, "head_dim": None}, ["num_attention_heads", "3", "44"]),
    "key heads": ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "4"]),
    "rope": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["yarn", "linear", "dynamic", "llama3"]),
    "new rope": ({"rope_parameters": {"rope_type": "longrope"}}, ["longrope", "linear", "dynamic", "llama3"]),
    "rope field": ({"rope_scaling": LLAMA3}, ["llama3", "low_freq_factor", "None"]),
    "rope text": ({"rope_scaling": "linear"}, ["rope_scaling", "linear"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    "softcap": ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0", "null"]),
    "window": ({"sliding_window": 48}, ["sliding_window", "48", "97"]),
    "size missing": ({"hidden_size": None}, ["hidden_size", "None"]),
    "size text": ({"num_hidden_layers": "3"}, ["num_hidden_layers", "'3'"]),
    "head_dim": ({"head_dim": 7}, ["head_dim", "7", "even"]),
    "head_dim below 0": ({"head_dim": -6}, ["head_dim", "-6"]),
    "eps": ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "'1e-5'"]),
    "bad json": ('{\n  "model_type": "llama",\n  "hidden_size" 44}', ["line 3"]),
    "a list": ("[1]", ["object", "list"]),
    "not utf-8": (b'{"model_type": "\xff"}', ["UTF-8", "16"]),
    "size 10**30": ({"hidden_size": 10**30}, ["hidden_size is 1000", "from 1 to 1,000,000"]),
    "layers 10**6": ({"num_hidden_layers": 10**6}, ["num_hidden_layers is 1000000", "from 1 to 1,000"]),
    "size true": ({"vocab_size": True}, ["vocab_size is True", "a whole number"]),
    "memory": (
        {"num_hidden_layers": 1000, "intermediate_size": 10**7},
        ["sizes need", "GiB", "this machine has"],
    ),
    "theta 10**400": ({"rope_theta": 10**400}, ["rope_theta is 1000", "expected a number from"]),
    "eps nan": ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan", "expected a number from"]),
    "dynamic of pairs": (
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}},
        ["head_dim is 2", "at least 4"],
    ),
    "llama3 factors": (
        {
            "rope_scaling": LLAMA3
            | {"low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 37}
        },
        ["low_freq_factor is 4", "high_freq_factor 4"],
    ),
    "eos 1e308": ({"eos_token_id": 1e308}, ["eos_token_id is 1e+308", "a whole number"]),
    "eos -1": ({"eos_token_id": [2, -1]}, ["eos_token_id is [2, -1]", "a list of whole numbers"]),
    "long number": ('{"vocab_size": ' + "1" * 5000 + "}", ["config.json"]),
}
TOKENIZER_CONFIG = {
    "bad json": ('{\n"add_bos_token": yes}', ["line 2"]),
    "bos a number": ({"bos_token": 1}, ["bos_token", "1"]),
    "template a number": ({"chat_template": 1}, ["chat_template", "1"]),
    "template half a pair": ({"chat_template": "\ud800"}, ["chat_template", "half a surrogate pair"]),
    "bos half a pair": ({"bos_token": "\ud800"}, ["bos_token", "half a surrogate pair"]),
    "add_bos_token a text": ({"add_bos_token": "no"}, ["add_bos_token", "'no'", "true or false"]),
}
TEMPLATES = {
    "huge": ("{{ messages[0].content * 10**10 }}", ["needs more than 1 GiB of memory"]),
    "refusing": ("{{ raise_exception('roles must alternate') }}", ["roles must alternate"]),
    "bad": ("{% for %}", ["chat template"]),
}  # fmt: skip


def tokenizer_config(kit, change, words):
    text = json.dumps(change) if isinstance(change, dict) else change
    folder = kit.a_model(tokenizer_config__json=text)
    return generate(folder, *(["--chat"] if "chat" in text else [])), [
        folder / "tokenizer_config.json",
        *words,
    ]


def chat_template(kit, template, words):
    folder = kit.a_model(tokenizer_config__json=json.dumps({"chat_template": template}))
    return generate(folder, "--chat"), ["chat template: ", *words]


@table("template", TEMPLATES, chat_template)
def test_chat_templates(outcomes, row):
    """Without it a downloaded template takes all of the machine's time or memory."""
    refused(outcomes, row)


@table("config", {n: ("config__json", *row) for n, row in BASE_CONFIG.items()}, base_file)
def test_base_config(outcomes, row):
    """Without it another architecture's checkpoint loads as far as its shapes allow and answers
    nonsense."""
    refused(outcomes, row)


@table("tokenizer config", TOKENIZER_CONFIG, tokenizer_config)
def test_tokenizer_config(outcomes, row):
    """Without it a hand-edited tokenizer_config.json is a traceback from inside a library."""
    refused(outcomes, row)


def model_without(kit, name, words):
    folder = kit.a_model()
    (folder / name).unlink()
    return generate(folder), [folder, *words]


def config_a_folder(kit):
    folder = kit.a_model()
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    return generate(folder), [folder / "config.json", "directory"]


FOLDERS = {
    "no config": (model_without, "config.json", ["config.json", "missing"]),
    "no weights": (model_without, WEIGHTS, [WEIGHTS]),
    "no tokenizer": (model_without, "tokenizer.model", ["tokenizer.json", "tokenizer.model"]),
    "config a folder": (config_a_folder,),
    "no model": (lambda kit: (generate(kit.root / "nowhere"), [kit.root / "nowhere", "no such"]),),
    "no pool": (lambda kit: (generate(kit.model, "--pool", kit.root / "nowhere"),
                            [kit.root / "nowhere", "no such"]),),
    "no adapter": (lambda kit: (generate(kit.model, "--adapter", "a=nowhere"), ["nowhere", "no such"]),),
    "pool of nothing": (lambda kit: (generate(kit.model, "--pool", kit.model), [kit.model, "not a pool"]),),
    "adapter of nothing": (lambda kit: (generate(kit.model, "--adapter", f"a={kit.model}"),
                                       [kit.model, "config"]),),
}  # fmt: skip


@table("folder", FOLDERS, lambda kit, build, *args: build(kit, *args))
def test_folders(outcomes, row):
    """Without it a mistyped folder is a FileNotFoundError with twenty lines above it."""
    refused(outcomes, row)


WORDS = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
PANICS = WORDS | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
ABORTS = WORDS | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}
TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n"
TOKENIZERS = {
    "tiktoken": ("tokenizer__model", TIKTOKEN, ["tiktoken", "Llama 3", "tokenizer.json"]),
    "not sentencepiece": ("tokenizer__model", b"\xff" * 90, ["sentencepiece"]),
    "empty": ("tokenizer__model", b"", ["empty"]),
    "pointer": ("tokenizer__model", POINTER, ["Git LFS pointer"]),
    "bad json": ("tokenizer__json", '{\n"model":', ["line 2"]),
    "another json": ("tokenizer__json", '{"version": "1.0"}', []),
    "panic": ("tokenizer__json", json.dumps(PANICS), ["tokenizers library fails", "must be non-zero"]),
    "abort": ("tokenizer__json", json.dumps(ABORTS), ["tokenizers library fails", "1 GiB of memory"]),
    "pieces no text": ("tokenizer__model", lambda: tokenizer_bytes().replace("▁".encode(), b"\xff\xff\xff"),
                       ["sentencepiece", "utf-8"]),
    "too many pieces": ("tokenizer__model", lambda: tokenizer_bytes(347),
                        ["token id 34", "331", "wrong tokenizer"]),
}  # fmt: skip


def a_tokenizer(kit, name, data, words):
    folder = kit.a_model(**{name: data() if callable(data) else data})
    if "wrong tokenizer" in words:  # a character of the last pieces, whose ids only the larger vocabulary has
        return generate(folder, prompt="zyxwvutsrqponmlkjihgfedcba"), words
    return generate(folder), [folder / name.replace("__", "."), *words]


@table("tokenizer", TOKENIZERS, a_tokenizer)
def test_tokenizers(outcomes, row):
    """Without it Llama 3's own tokenizer.model is a sentencepiece error that names nothing, and a
    tokenizer of another model is an IndexError, or a wrong answer where its ids happen to fit."""
    refused(outcomes, row)


# Adapters -----------------------------------------------------------------------------------------


def adapter_config(kit, fields, words):
    folder = kit.an_adapter(**fields)
    return generate(kit.model, "--adapter", f"a={folder}"), [folder / "adapter_config.json", *words]


ADAPTER_CONFIG = {
    "peft_type": ({"peft_type": "LOHA"}, ["peft_type", "LOHA", "LORA"]),
    "r differs": ({"r": 5}, ["r is 5", "lora_A has 2"]),
    "r 0": ({"r": 0}, ["r is 0", "from 1 to"]),
    "r a fraction": ({"r": 2.5}, ["r is 2.5", "number"]),
    "alpha a text": ({"lora_alpha": "16"}, ["lora_alpha", "'16'", "a number"]),
    "alpha missing": ({"lora_alpha": None}, ["lora_alpha", "None"]),
    "alpha 10**400": ({"lora_alpha": 10**400}, ["lora_alpha is 1000", "float32"]),
    "r true": ({"r": True}, ["r is True", "a whole number"]),
    "r 10**30": ({"r": 10**30}, ["r is 1000", "from 1 to"]),
    "base a number": ({"base_model_name_or_path": 5}, ["base_model_name_or_path is 5", "a text"]),
    "base half a pair": (
        {"base_model_name_or_path": "\ud800"},
        ["base_model_name_or_path", "half a surrogate"],
    ),
    "rslora a text": ({"use_rslora": "no"}, ["use_rslora is 'no'", "true or false"]),
    "dropout 7": ({"lora_dropout": 7}, ["lora_dropout is 7", "from 0 to 1"]),
    "alpha nan": ({"lora_alpha": float("nan")}, ["lora_alpha", "nan"]),
    "rank_pattern": ({"rank_pattern": {"q_proj": 3}}, ["q_proj", "r is 3", "lora_A has 2"]),
    "rank_pattern text": ({"rank_pattern": {"q_proj": "2"}}, ["rank_pattern", "numbers"]),
    "bad pattern": ({"alpha_pattern": {"q_proj(": 4}}, ["alpha_pattern", "q_proj("]),
    "targets too few": ({"target_modules": ["q_proj"]}, ["target_modules", "18 modules not named by"]),
    "targets too many": (
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        ["q_proj", "not named by"],
    ),
    "targets a number": ({"target_modules": 5}, ["target_modules", "5"]),
    "targets a bad regex": ({"target_modules": "(q_proj"}, ["target_modules", "pattern"]),
    "flags inside": ({"rank_pattern": {"(?i)q": 3}}, ["rank_pattern", "(?i)q", "bad pattern"]),
    "layers_to_transform": ({"layers_to_transform": [0, 1]}, ["target_modules", "layers.2"]),
    "layers a text": ({"layers_to_transform": "all"}, ["layers_to_transform", "all"]),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, ["fan_in_fan_out", "Conv1D"]),
    "bias": ({"bias": "lora_only"}, ["bias", "lora_only", "none"]),
    "lora_bias": ({"lora_bias": True}, ["lora_bias"]),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head", "gated"]),
    "dora": ({"use_dora": True}, ["use_dora", "DoRA"]),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, ["init_lora_weights", "pissa_niter_4", "convert"]),
}
ANOTHER_MATHEMATICS = {
    "use_qalora": True, "alora_invocation_tokens": [1, 2], "layer_replication": [[0, 2]],
    "target_parameters": ["w"], "trainable_token_indices": [3], "use_bdlora": True,
}  # fmt: skip


@table("adapter config", ADAPTER_CONFIG, adapter_config)
def test_adapter_config(outcomes, row):
    """Without it an adapter of another mathematics, rank or scale is added as if it were plain
    LoRA: wrong answers that look like answers."""
    refused(outcomes, row)


@pytest.mark.parametrize("field", ANOTHER_MATHEMATICS)
def test_another_mathematics(tmp_path, small_model, field):
    """Without it PEFT's rarer variants load as plain LoRA; each is refused by its own name."""
    kit = Kit(tmp_path, small_model)
    with pytest.raises(InputError, match=field):
        load_adapter(kit.an_adapter(**{field: ANOTHER_MATHEMATICS[field]}))


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq"])
def test_changed_base(tmp_path, small_model, start):
    """Without it an adapter that was trained beside a changed base is added to the unchanged one."""
    kit = Kit(tmp_path, small_model)
    with pytest.raises(InputError, match=f"init_lora_weights is '{start}'.*plain LoRA"):
        load_adapter(kit.an_adapter(init_lora_weights=start))


def adapter_tensors(kit, change, words):
    folder = kit.an_adapter()
    tensors, _ = read_safetensors(folder / TENSORS)
    other = change(tensors)
    write_safetensors(folder / TENSORS, other if isinstance(other, dict) else tensors)
    return generate(kit.model, "--adapter", f"a={folder}"), [folder, *words]


def keys_of_another_model(tensors):
    return {key.replace("model.layers.", "transformer.h."): value for key, value in tensors.items()}


def wider(tensors):
    tensors[f"{PREFIX}{Q1}.lora_A.weight"] = torch.ones(2, 53)


A1, B1 = (f"{PREFIX}{Q1}.lora_{part}.weight" for part in "AB")
ADAPTER_TENSORS = {
    "no lora_B": (lambda t: t.pop(B1), [TENSORS, Q1, "lora_A", "no lora_B"]),
    "no lora_A": (lambda t: t.pop(A1), [TENSORS, Q1, "lora_B", "no lora_A"]),
    "no tensors": (lambda t: t.clear(), [TENSORS, "no LoRA tensors"]),
    "extra": (put(f"{PREFIX}model.norm.weight", torch.ones(44)), [TENSORS, "model.norm.weight", "(44,)"]),
    "dora": (put(f"{PREFIX}{Q1}.lora_magnitude_vector", torch.ones(24)), [TENSORS, "lora_magnitude_vector"]),
    "bias": (put(f"{PREFIX}{Q1}.lora_B.bias", torch.ones(24)), [TENSORS, "lora_B.bias"]),
    "no key matches": (keys_of_another_model, [TENSORS, "21 of 21", "transformer.h.0"]),
    "deeper": (
        lambda t: {k.replace("layers.2.", "layers.5."): y for k, y in t.items()},
        [TENSORS, "layer 5", "3 layers"],
    ),
    "wider": (wider, [TENSORS, Q1, "53", "44"]),
    "two ranks": (put(A1, torch.ones(5, 44)), [TENSORS, Q1, "5", "2"]),
    "nan": (spoil(B1, float("nan")), [TENSORS, B1, "NaN"]),
    "inf": (spoil(A1, float("inf")), [TENSORS, A1, "Inf"]),
    "two adapters": (
        put(f"{PREFIX}{Q1}.lora_A.other.weight", torch.ones(2, 44)),
        [TENSORS, Q1, "more than one"],
    ),
}


@table("adapter tensors", ADAPTER_TENSORS, adapter_tensors)
def test_adapter_tensors(outcomes, row):
    """Without it an adapter for another base loads and silently does nothing: the commonest
    complaint there is."""
    refused(outcomes, row)


def adapter_file(kit, name, text, words):
    folder = kit.an_adapter()
    (folder / name).write_text(text)
    return generate(kit.model, "--adapter", f"a={folder}"), [folder / name, *words]


ADAPTER_FILES = {
    "config bad json": ("adapter_config.json", '{"r": 2,\n\n"lora_alpha": }', ["line 3"]),
    "config a list": ("adapter_config.json", "[]", ["object", "list"]),
    "samples bad json": ("samples.jsonl", '{"prompt": "a"}\n{"prompt"\n', []),
    "samples without prompt": ("samples.jsonl", '{"text": "a"}\n', ["prompt"]),
}


@table("adapter file", ADAPTER_FILES, adapter_file)
def test_adapter_files(outcomes, row):
    """Without it a config with a comma too many is a JSONDecodeError that names no file."""
    refused(outcomes, row)
    if "samples" in row:
        assert f"samples.jsonl:{2 if 'bad' in row else 1}:" in outcomes[row].result()[0].stderr


# The pool, names and gates ------------------------------------------------------------------------


def pool_json(kit, text, words):
    folder = kit.a_pool(gates=False)
    (folder / "pool.json").write_text(text)
    return generate(kit.model, "--pool", folder), [folder / "pool.json", *words]


POOL_JSON = {
    "bad json": ('{\n"adapters": [\n"a",]}', ["line 3"]),
    "no list": ('{"adapters": "spelling"}', ["adapters", "'spelling'"]),
    "outside": ('{"adapters": ["../spelling"]}', ["../spelling", "folder names"]),
    "hidden": ('{"adapters": ["a\\u0007b"]}', ["'a\\x07b'", "folder names"]),
    "twice": ('{"adapters": ["spelling", "spelling"]}', ["twice", "spelling"]),
    "a number": ('{"adapters": [5]}', ["adapters is [5]", "a list of texts"]),
    "base a number": ('{"adapters": ["spelling"], "base": 5}', ["base is 5", "a text"]),
    "half a pair": ('{"adapters": ["\\ud800"]}', ["adapters", "half a surrogate pair"]),
    "template": ('{"adapters": ["spelling"], "template": "hello"}', ["template", "hello", "{prompt}"]),
}


@table("pool json", POOL_JSON, pool_json)
def test_pool_json(outcomes, row):
    """Without it a wrong template answers every prompt the same, and a name with .. reads outside
    the pool."""
    refused(outcomes, row)


def two_folders(kit):
    a, b = kit.an_adapter(), kit.an_adapter()
    return generate(kit.model, "--adapter", f"a={a}", "--adapter", f"a={b}"), ["'a' twice", a, b]


def in_the_pool_too(kit):
    pool, a = kit.a_pool(gates=False), kit.an_adapter()
    words = ["'spelling' twice", pool / "adapters" / "spelling", a]
    return generate(kit.model, "--pool", pool, "--adapter", f"spelling={a}"), words


def method(name, *words, pool=True):
    def build(kit):
        folder = ["--pool", kit.a_pool(gates=False)] if pool else []
        return generate(kit.model, *folder, "--method", name), words

    return (build,)


NAMES = {
    "adapter": method("adapter:speling", "no adapter 'speling'", "did you mean spelling"),
    "far adapter": method("adapter:zzz", "no adapter 'zzz'", "counting, spelling"),
    "method": method("meteorra", "no method 'meteorra'", "did you mean meteora"),
    "far method": method(
        "zzz", "no method 'zzz'", "base, oracle, adapter:NAME", "meteora_top2, meteora_once"
    ),
    "no adapters": method("uniform", "--pool", "--adapter", pool=False),
    "no gates": method("meteora", "meteora_top2.safetensors", "train.py gates --top_k 2"),
    "no such gates": (
        lambda kit: (
            generate(kit.model, "--pool", kit.a_pool(), "--top_k", "3"),
            ["meteora_top3.safetensors", "train.py gates --top_k 3"],
        ),
    ),
    "name twice": (two_folders,),
    "name in the pool too": (in_the_pool_too,),
}


@table("name", NAMES, lambda kit, build: build(kit))
def test_names(outcomes, row):
    """Without it a typing mistake costs a look into the source, and one of two adapters of a name
    wins unseen."""
    refused(outcomes, row)


def gates_missing(kit):
    pool = kit.a_pool()
    (pool / "pool.json").write_text('{"adapters": ["spelling"]}')
    return pool, ["counting", "missing"]


def gates_changed(kit):
    pool = kit.a_pool()
    before = load_adapter(pool / "adapters" / "counting").hash
    changed = random_adapter("counting", linear_shapes(load_llama(kit.model)), 3, seed=99)
    save_adapter(changed, pool / "adapters" / "counting")
    return pool, ["counting", before[:12], load_adapter(pool / "adapters" / "counting").hash[:12]]


def gates_changed_all(kit):
    pool, _ = gates_changed(kit)
    (pool / "pool.json").write_text('{"adapters": ["counting"]}')
    return pool, ["spelling (missing", "counting (trained with"]


def gates_shape(kit):
    pool = kit.a_pool()
    file = pool / "gates" / "meteora_top2.safetensors"
    tensors, metadata = read_safetensors(file)
    tensors[f"{Q1}.gate.weight"] = torch.ones(2, 45)
    write_safetensors(file, tensors, metadata)
    return pool, [f"{Q1}.gate.weight", "(2, 45)", "(2, 44)"]


def gates_of_others(kit):
    pool = kit.a_pool()
    write_safetensors(pool / "gates" / "meteora_top2.safetensors", {"w": torch.ones(3)})
    return pool, ["not a gate file"]


def gates(kit, build):
    pool, words = build(kit)
    args = generate(kit.model, "--pool", pool, "--method", "meteora")
    return args, [pool / "gates" / "meteora_top2.safetensors", *words]


GATES = {"adapter missing": gates_missing, "adapter changed": gates_changed, "both": gates_changed_all,
         "shape": gates_shape, "another file": gates_of_others}  # fmt: skip


@table("gates", {name: (build,) for name, build in GATES.items()}, gates)
def test_gates(outcomes, row):
    """Without it gates trained for one set of adapters route to another: rows joined by position,
    answers wrong."""
    refused(outcomes, row)


# Options and prompts ------------------------------------------------------------------------------

OPTIONS = {
    "temperature": (["--temperature", "-1"], ["--temperature", "-1"]),
    "temperature nan": (["--temperature", "nan"], ["--temperature", "nan"]),
    "top_p": (["--top_p", "0"], ["--top_p", "0"]),
    "top_k": (["--top_k", "0"], ["--top_k", "0", "1"]),
    "gate_temperature": (["--gate_temperature", "0"], ["--gate_temperature", "0"]),
    "max_new_tokens": (["--max_new_tokens", "0"], ["--max_new_tokens", "0", "1"]),
    "not a number": (["--top_k", "two"], ["--top_k", "'two'"]),
    "not a choice": (["--dtype", "int4"], ["--dtype", "int4", "bfloat16"]),
    "unknown": (["--temprature", "1"], ["--temprature", "--temperature"]),
    "top_p tiny": (["--top_p", "1e-46"], ["--top_p is 1e-46", "from 1e-09 to 1"]),
    "temperature tiny": (["--temperature", "1e-300"], ["--temperature is 1e-300", "0 or a number from"]),
    "seed 2**64": (["--seed", str(2**64)], [f"--seed is {2**64}", "a whole number"]),
    "a power": (["--retrieve", "²"], ["--retrieve is '²'", "a whole number"]),
    "5,000 digits": (["--resident", "9" * 5000], ["--resident is '999", "a whole number"]),
    "mix 1e400": (["--mix", "a=1e400"], ["the weight of a is 1e400", "float32"]),
    "method of 5,000 digits": (["--method", "meteora_top" + "1" * 5000], ["no method 'meteora_top1"]),
    "seed": (["--seed", "1" + "0" * 30, "--temperature", "1"], ["--seed"]),
    "raw and chat": (["--raw", "--chat"], ["--raw", "--chat"]),
    "chat without a template": (["--chat"], ["chat template"]),
    "system without chat": (["--system", "be brief"], ["--system", "--chat"]),
    "system not utf-8": (["--chat", "--system", b"caf\xe9"], ["--system", "character 3"]),
    "two methods, one prompt": (["--method", "base", "--method", "base"], ["2 times --method", "1 prompts"]),
    "two methods, three prompts": (["--prompt", "a", "--prompt", "b", "--method", "base", "--method", "base"],
                                   ["2 times --method", "3 prompts"]),
    "adapter without =": (["--adapter", "spelling"], ["'spelling'", "NAME=DIR"]),
    "adapter without a name": (["--adapter", "=folder"], ["'=folder'", "NAME=DIR"]),
    "device": (["--device", "nonsense"], ["nonsense"]),
    "device that isn't there": (["--device", "cuda:99"], ["cuda:99"]),
    "device without data": (["--device", "meta"], ["meta"]),
    "device without its package": (["--device", "hpu"], ["hpu"]),
    "prompt not utf-8": (["--prompt", b"caf\xe9"], ["prompt", "UTF-8"]),
    "html below a file": (["--html", Path(__file__) / "page.html"], [Path(__file__)]),
    "html in no folder": (["--html", "no/folder/page.html"], ["no/folder/page.html: can't be written: there is"]),
    "svg in no folder": (["--svg", "no/folder/a.svg"], ["no/folder/a.svg: can't be written: there is no folder"]),
    "adapter name hidden": (["--adapter", "a\x1b[2Jb=x"], ["adapter name is 'a\\x1b[2Jb', expected"]),
    "adapter name bidi": (["--adapter", "a\u202eb=x"], ["adapter name is 'a\\u202eb', expected"]),
    "adapter name long": (["--adapter", f"{'n' * 256}=x"], ["adapter name is 'nnn"]),
    "adapter path long": (["--adapter", f"n={'d' * 300}"], ["File name too long"]),
}  # fmt: skip


@table("option", OPTIONS, lambda kit, args, words: (generate(kit.model, *args), words))
def test_options(outcomes, row):
    """Without it a value that no sampler can use is a NaN, an endless loop or a traceback from
    inside torch."""
    refused(outcomes, row)


def html_a_folder(kit):
    folder = kit.folder("page.html")
    folder.mkdir(parents=True)
    return generate(kit.model, "--html", folder), [f"{folder}: ", "directory"]


def long_prompt(kit, *more):
    return generate(kit.model, *more, prompt="the quick brown fox " * 40), []


def prompts_file(kit, text):
    file = kit.folder("prompts.jsonl")
    file.parent.mkdir()
    file.write_text(text)
    return ["generate.py", "--model", kit.model, "--prompts", file]


PROMPTS = {
    "no row": (lambda kit: (prompts_file(kit, "\n"), ["prompts.jsonl: holds no prompt"]),),
    "bad row": (
        lambda kit: (
            prompts_file(kit, '{"prompt": "a"}\n{"prompt"\n'),
            ["prompts.jsonl:2: bad JSON at column 10: "],
        ),
    ),
    "stdin not utf-8": (
        lambda kit: (generate(kit.model, prompt="-"), ["standard input", "UTF-8"], b"caf\xe9"),
    ),
    "too long": (lambda kit: (long_prompt(kit)[0], [" tokens", "context 97", "--truncate"]),),
    "empty without BOS": (lambda kit: (generate(_no_bos(kit), "--raw", prompt=""), ["empty prompt", "BOS"]),),
}


def _no_bos(kit):
    """The same model with a tokenizer.json that knows no BOS."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    folder = kit.a_model()
    tokenizer = Fast(models.WordLevel({"the": 5, "fox": 7, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@table("prompt", PROMPTS, lambda kit, build: build(kit))
def test_prompts(outcomes, row):
    """Without it a long prompt silently loses one end, and an empty one asks the model about
    nothing."""
    refused(outcomes, row)


@table("late", {"html a folder": (html_a_folder,)}, lambda kit, build: build(kit))
def test_written_over_a_folder(outcomes, row):
    """Without it the line names a temporary file that the user never heard of."""
    refused(outcomes, row)


# Training -----------------------------------------------------------------------------------------

LINES = '{"prompt": "a", "response": "b"}\n\n'


def task_files(kit, name, text, words):
    tasks = kit.tasks(**{name: text})
    return train(kit, tasks), [tasks / "toy" / name.replace("__", "."), *words]


TASK_FILES = {
    "bad line": ("train__jsonl", LINES + '{"prompt": \n', ["jsonl:3:"]),
    "no response": ("train__jsonl", LINES + '{"prompt": "a"}\n', ["jsonl:3:", "response"]),
    "response a number": ("test__jsonl", '{"prompt": "a", "response": 4}\n', ["jsonl:1:", "response"]),
    "a list": ("train__jsonl", "[1, 2]\n", ["jsonl:1:", "prompt"]),
    "not utf-8": ("train__jsonl", b'{"prompt": "caf\xe9"}\n', ["UTF-8"]),
    "metric": ("task__json", '{"metric": "exact_mach"}', ["exact_mach", "exact_match", "rouge_l"]),
    "metric a list": ("task__json", '{"metric": ["bleu"]}', ["bleu", "exact_match"]),
}


def file_missing(kit):
    tasks = kit.tasks()
    (tasks / "toy" / "test.jsonl").unlink()
    return train(kit, tasks), [tasks / "toy" / "test.jsonl", "No such file"]


def file_a_folder(kit):
    tasks = kit.tasks()
    (tasks / "toy" / "test.jsonl").unlink()
    (tasks / "toy" / "test.jsonl").mkdir()
    return train(kit, tasks), [tasks / "toy" / "test.jsonl", "directory"]


def training(*more, words):
    return (lambda kit: (train(kit, kit.tasks(), *more), words),)


TRAINING = {
    "no tasks": (
        lambda kit: (["train.py", "adapters", "--model", kit.model, "--pool", "p"], ["--tasks is missing"]),
    ),
    "no model": (lambda kit: (["train.py", "adapters", "--tasks", "t", "--pool", "p"], ["--model"]),),
    "command": (lambda kit: (["train.py", "adaptors"], ["adaptors", "did you mean adapters"]),),
    "far command": (lambda kit: (["train.py", "zzz"], ["zzz", "base", "adapters", "gates", "lorahub"]),),
    "tasks of nothing": (lambda kit: (train(kit, kit.model), [kit.model, "no task folders"]),),
    "no such task": training("--only", "toi", words=["toi", "did you mean toy"]),
    "file missing": (file_missing,),
    "file a folder": (file_a_folder,),
    "pool below a file": training("--pool", Path(__file__) / "pool", words=[Path(__file__)]),
    "target": training("--target", "w_proj", words=["--target", "w_proj", "q_proj"]),
    "rank": training("--r", "0", words=["--r", "0"]),
    "alpha": training("--alpha", "nan", words=["--alpha", "nan"]),
    "alpha 1e308": training("--alpha", "1e308", words=["--alpha is 1e308", "1,000,000"]),
    "rank 10**8": training("--r", 10**8, words=["--r is 100000000", "from 1 to 65,536"]),
    "batch 10**30": training("--batch_size", 10**30, words=["--batch_size is 1000", "from 1 to 65,536"]),
    "late": training("--late_start", 1.5, words=["--late_start", "1.5", "to 1"]),
    "late and joint": training("--late_start", 0.5, "--joint", "lora_b", words=["--late_start", "--joint"]),
    "composite of one": training("--composite", 0.1, words=["--composite 0.1", "8 examples", "--batch_size"]),
    "composite": training("--composite", -0.5, words=["--composite", "-0.5", "to 1"]),
    "muon for adapters": training("--optimizer", "muon", words=["--optimizer muon", "adamw"]),
    "samples": training("--samples", "-1", words=["--samples", "-1"]),
    "device": training("--device", "toaster", words=["device", "toaster"]),
    "steps": training("--steps", "0", words=["--steps", "0"]),
    "template": training("--template", "no place", words=["--template", "no place", "{prompt}"]),
    "nothing short enough": training("--max_length", "2", words=["toy", "2"]),
}


@table("task file", TASK_FILES, task_files)
def test_task_files(outcomes, row):
    """Without it one bad line of a hundred thousand is a traceback, or an example that trains on
    'None'."""
    refused(outcomes, row)


@table("training", TRAINING, lambda kit, build: build(kit))
def test_training(outcomes, row):
    """Without it a wrong option shows after hours, at the first save, or in a pool that nobody can
    read."""
    done = refused(outcomes, row)
    pools = [Path(pool) for option, pool in itertools.pairwise(done.args) if option == "--pool"]
    assert not any(list(pool.glob("runs/*/log.csv")) for pool in pools), "trained before it refused"


# What is odd and works ----------------------------------------------------------------------------

WORKS = {
    "truncate left": (lambda kit: long_prompt(kit, "--truncate", "left", "--json"),),
    "truncate right": (lambda kit: long_prompt(kit, "--truncate", "right", "--json"),),
    "empty prompt": (lambda kit: (generate(kit.model, "--raw", "--json", prompt=""), []),),
    "generation_config": (lambda kit: (generate(kit.a_model(generation_config__json='{\n"eos'), "--json"),
                                       ["generation_config.json", "line 2", "config.json"]),),
    "another base's adapter": (lambda kit: adapter_config(
        kit, {"base_model_name_or_path": "Llama-9"}, ["Llama-9"]),),
    "unknown field": (lambda kit: adapter_config(kit, {"use_quantum": True}, ["use_quantum"]),),
}  # fmt: skip


def worked(outcomes, row):
    """The process, the words and the warnings of a row that works; nothing else may stand on
    standard error."""
    done, words = outcomes[row].result()
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.stderr.count("\n") == 2 + len(warnings), done.stderr  # method and template
    return done, words, warnings


table("works", WORKS, lambda kit, build: build(kit))


@pytest.mark.parametrize("row", ["works/truncate left", "works/truncate right"])
def test_truncate(outcomes, row):
    """Without it --truncate may cut the wrong end, or the BOS, or one token too many."""
    done = worked(outcomes, row)[0]
    ids = [token["id"] for token in json.loads(done.stdout)["prompt_tokens"]]
    whole = Tokenizer(done.args[done.args.index("--model") + 1]).encode("the quick brown fox " * 40)
    assert len(whole) > 97 and whole[0] == 1
    assert ids == (whole[:97] if row.endswith("right") else [1, *whole[-96:]])


@pytest.mark.parametrize("row", ["works/empty prompt"])
def test_empty_prompt(outcomes, row):
    """Without it an empty prompt crashes on a tensor of no tokens; BOS alone is what the model was
    trained to see."""
    assert [t["id"] for t in json.loads(worked(outcomes, row)[0].stdout)["prompt_tokens"]] == [1]


@pytest.mark.parametrize(
    "row", [f"works/{n}" for n in ("generation_config", "another base's adapter", "unknown field")]
)
def test_warnings(outcomes, row):
    """Without it a harmless flaw stops the work, or the commonest mistake (another base's adapter)
    goes unsaid."""
    _, words, warnings = worked(outcomes, row)
    assert len(warnings) == 1, warnings
    for word in words[1:] if "adapter_config" in str(words[0]) and "base" in row else words:
        assert str(word) in warnings[0]


# Killed -------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import torch
from common.tensors import read_safetensors, write_safetensors

file, left, kills = sys.argv[1], 0, 0
write_safetensors(file, {"w": torch.zeros(1 << 20)}, {"version": "0"})
start = time.perf_counter()
write_safetensors(file, {"w": torch.zeros(1 << 20)}, {"version": "0"})
took = time.perf_counter() - start  # of one save: the kills fall within the first few
while kills < 30 or left < 4:  # on some machines few kills fall within a save
    kills += 1
    child = os.fork()
    if not child:
        version = int(read_safetensors(file)[1]["version"])
        while True:
            version += 1
            write_safetensors(file, {"w": torch.full((1 << 20,), version)}, {"version": str(version)})
    time.sleep(random.uniform(0.01, 0.03 + 5 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left += any(name.endswith(".partial") for name in os.listdir(os.path.dirname(file)))
    tensors, metadata = read_safetensors(file)
    assert (tensors["w"] == int(metadata["version"])).all()
write_safetensors(file, {"w": torch.zeros(2)})
assert os.listdir(os.path.dirname(file)) == [os.path.basename(file)], "a leftover of the killed"
print(metadata["version"], left)
"""


def test_killed_save(tmp_path):
    """Without it a run killed half-way through a save loses the checkpoint that it had."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "w.safetensors")], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    versions, left = map(int, done.stdout.split())
    assert versions > 3 and left > 3, "no save was under way when the kill came: this proves nothing"


def test_every_row_is_looked_at(request):
    """Without it a table whose test was renamed away would be built by nobody, and nobody would
    notice."""
    if len(request.session.items) > len(ROWS):
        seen = {i.callspec.params.get("row") for i in request.session.items if hasattr(i, "callspec")}
        assert ROWS.keys() <= seen
