"""Cases that damage a model folder or a PEFT adapter, which transformers and PEFT can read too.

Where such a folder gives another answer, transformers (and PEFT) decide whether it is the right
one. They don't judge flipped bits among the weights, nor a sentencepiece model, whose pieces no
library checks: there any answer will do.
"""

import json

from fuzz.files import damage_bytes, damage_json_file, replace_file
from fuzz.plan import ANY, BEE, CHAT, GENERATE, MUST, ORACLE, SHARDS, SMALL, Plan, kind
from fuzz.tensors import damage_header, damage_metadata, damage_tensor
from fuzz.values import HUGE, NUMBERS, PATTERNS, dump, json_value, text


@kind("config.json", "hf")
def config(rng, folder):
    return Plan(GENERATE, damage_json_file(rng, folder / "hf" / "config.json"), ORACLE)


@kind("config.json numbers", "hf")
def config_numbers(rng, folder):
    file = folder / "hf" / "config.json"
    fields = json.loads(file.read_text())
    extra = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}
    extra["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    fields |= rng.choice([{}, extra, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}])
    names = [name for name, value in fields.items() if isinstance(value, (int, float, dict))]
    holder, name = fields, rng.choice(names)
    if isinstance(fields[name], dict):
        holder, name = fields[name], rng.choice(sorted(fields[name]))
    holder[name] = new = rng.choice(NUMBERS)
    file.write_text(dump(fields))
    return Plan(GENERATE, f"{name} is {str(new)[:60]}", ORACLE)


@kind("generation_config.json", "hf")
def generation_config(rng, folder):
    return Plan(GENERATE, damage_json_file(rng, folder / "hf" / "generation_config.json"), ORACLE)


@kind("weights header", "hf")
def weights_header(rng, folder):
    return Plan(GENERATE, damage_header(rng, folder / "hf" / "model.safetensors")[0], ORACLE)


@kind("weights tensors", "hf")
def weights_tensors(rng, folder):
    file = folder / "hf" / "model.safetensors"
    if rng.random() < 0.1:
        return Plan(GENERATE, damage_metadata(rng, file)[0], ORACLE)
    return Plan(GENERATE, damage_tensor(rng, file)[0], ORACLE)


@kind("weights bytes", "hf")
def weights_bytes(rng, folder):
    file = folder / "hf" / "model.safetensors"
    if rng.random() < 0.3:
        return Plan(GENERATE, replace_file(rng, file), MUST)
    within = rng.choice([8, 200, 5000, None])
    return Plan(GENERATE, damage_bytes(rng, file, within), ANY)


@kind("shards", "shards")
def shards(rng, folder):
    index = folder / "shards" / "model.safetensors.index.json"
    shard = folder / "shards" / "model-00001-of-00002.safetensors"
    draw = rng.random()
    if draw < 0.6:
        return Plan(SHARDS, damage_json_file(rng, index), ORACLE)
    if draw < 0.7:
        return Plan(SHARDS, replace_file(rng, shard), MUST)
    if draw < 0.85:
        return Plan(SHARDS, damage_header(rng, shard)[0], ORACLE)
    return Plan(SHARDS, damage_tensor(rng, shard)[0], ORACLE)


@kind("tokenizer.json", "hf")
def tokenizer_json(rng, folder):
    return Plan(GENERATE, damage_json_file(rng, folder / "hf" / "tokenizer.json"), ORACLE)


@kind("tokenizer.json steps", "hf")
def tokenizer_steps(rng, folder):
    """What a tokenizer does to text: patterns, replacements, added tokens, vocabulary."""
    file = folder / "hf" / "tokenizer.json"
    raw = json.loads(file.read_text())
    pattern, content = rng.choice(PATTERNS), rng.choice(["", "x", "▁", "a" * 1000, text(rng)])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    nested = split
    for _ in range(rng.choice([3, 60, 300])):
        nested = {"type": "Sequence", "pretokenizers": [nested]}
    token = {"id": 5, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    token |= {"normalized": rng.random() < 0.5, "special": rng.random() < 0.5}
    padding = {
        "strategy": {"Fixed": rng.choice([7, 10**9])},
        "direction": "Right",
        "pad_to_multiple_of": None,
    }
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    truncation = {
        "direction": "Right",
        "max_length": rng.choice([0, 2]),
        "strategy": "LongestFirst",
        "stride": 9,
    }
    changes = {
        "pre_tokenizer": rng.choice([split, nested, {"type": "Sequence", "pretokenizers": []}]),
        "normalizer": rng.choice([replace, replace | {"pattern": {"String": ""}}, {"type": "Prepend", "prepend": ""}]),
        "decoder": rng.choice([replace, {"type": "Strip", "content": "", "start": 10**9, "stop": 10**9}]),
        "added_tokens": [*raw["added_tokens"], token | {"id": rng.choice([5, 297, 10**6, 2**32 - 1, 2**40, -1])}],
        "post_processor": {"type": "ByteLevel", "trim_offsets": True}, "padding": padding, "truncation": truncation,
    }  # fmt: skip
    name = rng.choice([*changes, "vocab", "vocab", "merges", "model"])
    if name in changes:
        raw[name] = done = changes[name]
    else:
        done = _damage_vocabulary(rng, raw, name)
    file.write_text(json.dumps(raw))
    return Plan(GENERATE, f"tokenizer.json: {name} is {str(done)[:150]!r}", ORACLE)


def _damage_vocabulary(rng, raw, name):
    model = raw["model"]
    if name == "model":
        done = rng.choice(["WordLevel", "WordPiece", "Unigram", "", "\x1b[31m"])
        model["type"] = done
        return done
    if name == "merges":
        pairs = [["no", "such"], ["a"], ["a", "b", "c"], "a b", 5, ["", ""], None, ["\x1b[31m", "b"]]
        model["merges"] = done = [rng.choice(pairs), *model["merges"]]
        return done
    word = rng.choice(sorted(model["vocab"]))
    done = rng.choice([0, 1, 297, 331, 10**6, 2**32 - 1, 2**32, -1, 0.5, "1", None, "empty", "renamed"])
    if done == "empty":
        model["vocab"] = {}
    elif done == "renamed":
        model["vocab"][text(rng)] = model["vocab"].pop(word)
    else:
        model["vocab"][word] = done
    return f"{word}: {done}"


@kind("tokenizer.model", "small")
def tokenizer_model(rng, folder):
    file = folder / "small" / "tokenizer.model"
    if rng.random() < 0.2:
        return Plan(SMALL, replace_file(rng, file), MUST)
    return Plan(SMALL, damage_bytes(rng, file, rng.choice([50, None])), ANY)


@kind("tokenizer_config.json", "hf")
def tokenizer_config(rng, folder):
    file = folder / "hf" / "tokenizer_config.json"
    argv = rng.choice([GENERATE, CHAT])
    if rng.random() < 0.6:
        return Plan(argv, damage_json_file(rng, file), ORACLE)
    name = rng.choice(["bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "added_tokens_decoder",
                       "add_bos_token", "legacy", "additional_special_tokens", "model_max_length"])  # fmt: skip
    token = {"content": text(rng), "special": True, "__type": "AddedToken"}
    new = rng.choice([json_value(rng), text(rng), "zzz", token, {"5": token}, {"-1": token}, {"x": 1}])
    file.write_text(dump(json.loads(file.read_text()) | {name: new}))
    return Plan(argv, f"tokenizer_config.json: {name} is {str(new)[:100]!r}", ORACLE)


@kind("sentencepiece's other files", "small")
def other_files(rng, folder):
    name = rng.choice(["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
    file = folder / "small" / name
    if not file.exists():
        file.write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>", "legacy": True}))
    if rng.random() < 0.6:
        return Plan(SMALL, damage_json_file(rng, file), ANY)
    new = rng.choice([json_value(rng), text(rng), 10**6, 2**31, -1, 330, 5, 331])
    file.write_text(dump({rng.choice(["<pad>", "bos_token", "eos_token", *PATTERNS, text(rng)]): new}))
    return Plan(SMALL, f"{name}: a value is {str(new)[:100]!r}", ANY)


@kind("special_tokens_map.json", "hf")
def special_tokens(rng, folder):
    return Plan(CHAT, damage_json_file(rng, folder / "hf" / "special_tokens_map.json"), ORACLE)


# Templates --------------------------------------------------------------------------------------

RANGE = "{% for a in range(99999) %}"
ENDLESS = {
    "nested ranges": RANGE * 4 + "{% endfor %}" * 4,
    "nested ranges with text": RANGE * 3 + "x" + "{% endfor %}" * 3,
    "lipsum": "{{ lipsum(n=100000, max=9999) }}",
    "a long text": "{{ 'a' * 10**9 }}",
    "a long list": "{{ [0] * 10**9 }}",
    "tojson's indent": "{{ messages | tojson(indent=10**9) }}",
    "doubling": "{% set n = namespace(t='ab') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "format": "{{ '%99999999999d' % 1 }}",
    "center": "{{ 'a' | center(10**11) }}",
    "text beyond the context": "{{ 'a b ' * 5000000 }}",
}
FAILING = {
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "syntax": "{% for %}", "open": "{{", "unknown tag": "{% x %}", "unknown filter": "{{ 1 | x }}",
    "a zero": "{{ 1 / 0 }}", "attributes": "{{ ''.__class__.__mro__ }}", "undefined": "{{ messages.x.y.z }}",
    "include": "{% include 'x' %}", "raise": "{{ raise_exception('\x1b[31mno\x1b[0m\n\x07\u202e') }}",
    "raise much": "{{ raise_exception('x' * 10000) }}", "raise nothing": "{{ raise_exception() }}",
    "nested ifs": "{% if true %}" * 3000, "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "minuses": "{{ " + "-" * 100000 + "1 }}", "half a pair": "{{ '\ud800' }}", "time": "{{ strftime_now('%') }}",
    "time's type": "{{ strftime_now(5) }}", "escape in a name": "{{ \x1b[31m }}", "NUL": "\x00{{ 1 / 0 }}",
}  # fmt: skip


@kind("chat templates", "hf")
def chat_template(rng, folder):
    """An endless one in a few cases only: stopping it takes seconds."""
    file = folder / "hf" / "tokenizer_config.json"
    raw = json.loads(file.read_text())
    draw = rng.random()
    expect = ORACLE
    if draw < 0.15:
        name = rng.choice(sorted(ENDLESS))
        template, expect = ENDLESS[name], MUST
    elif draw < 0.6:
        name = rng.choice(sorted(FAILING))
        template = FAILING[name]
    elif draw < 0.8:
        at = rng.randrange(len(raw["chat_template"]))
        name = f"cut at {at}"
        template = raw["chat_template"][:at] + raw["chat_template"][at + rng.choice([1, 2, 5]) :]
    else:
        template = rng.choice(
            [json_value(rng), text(rng), HUGE, [{"name": "default", "template": text(rng)}]]
        )
        name = repr(template)[:60]
    where = rng.choice(["tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"])
    if where == "tokenizer_config.json" or not isinstance(template, str):
        file.write_text(dump(raw | {"chat_template": template}))
        return Plan(CHAT, f"chat template {name}", expect)
    path = folder / "hf" / "chat_template.jinja"
    if where == "additional_chat_templates":
        path, expect = folder / "hf" / where / "tool_use.jinja", ANY
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(template.encode("utf-8", "surrogatepass"))
    return Plan(CHAT, f"chat template {name} in {path.name}", expect)


# Adapters ---------------------------------------------------------------------------------------


@kind("adapter_config.json", "hf", "bee")
def adapter_config(rng, folder):
    return Plan(BEE, damage_json_file(rng, folder / "bee" / "adapter_config.json"), ORACLE)


@kind("adapter_config.json fields", "hf", "bee")
def adapter_fields(rng, folder):
    file = folder / "bee" / "adapter_config.json"
    raw = json.loads(file.read_text())
    new = rng.choice([rng.choice(NUMBERS), json_value(rng), text(rng)])
    pattern = rng.choice([*PATTERNS, "(?i)Q_PROJ", "layers.1.mlp.up_proj"])
    values = {"r": new, "lora_alpha": new, "rank_pattern": {pattern: new}, "alpha_pattern": {pattern: new}}
    values |= dict.fromkeys(["target_modules", "exclude_modules", "layers_pattern"], pattern)
    values |= dict.fromkeys(["layers_to_transform", "use_rslora", "bias", "peft_type", "unheard_of"], new)
    values |= dict.fromkeys(["base_model_name_or_path", "init_lora_weights", "modules_to_save"], new)
    name = rng.choice(sorted(values))
    raw[name] = values[name]
    file.write_text(dump(raw))
    return Plan(BEE, f"adapter_config.json: {name} is {str(values[name])[:100]!r}", ORACLE)


@kind("adapter tensors", "hf", "bee")
def adapter_tensors(rng, folder):
    file = folder / "bee" / "adapter_model.safetensors"
    draw = rng.random()
    if draw < 0.4:
        return Plan(BEE, damage_header(rng, file)[0], ORACLE)
    if draw < 0.8:
        return Plan(BEE, damage_tensor(rng, file)[0], ORACLE)
    if draw < 0.9:
        return Plan(BEE, replace_file(rng, file), MUST)
    return Plan(BEE, damage_bytes(rng, file, rng.choice([8, 200, None])), ANY)
