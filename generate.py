"""Sampling, and the main command: prompts in, answers out, each token choosing its adapters.

    python generate.py --prompt "..."                     the embedded default, tiny/
    python generate.py --model DIR --pool DIR --prompt "..." --prompt "..." --method adapter:NAME --method meteora

For people who import it: load() gives a model with its adapters, stream() yields tokens as they come, answer() waits
for whole answers.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from common.files import InputError, read_jsonl, run_script, write_text
from common.options import parse_args
from common.pictures import Printer, html_page
from common.tokenizer import TextStream, check_ids
from methods.session import (
    Mole,
    add_adapter,
    check_method,
    default_method,
    load_mole,
    retrieve,
    set_methods,
)
from model import KVCache
from moe_lora import Recorder
from pool.retriever import sentence_encoder
from tasks.folders import fill

TINY = Path(__file__).parent / "tiny"


@dataclass
class Sampling:
    """How tokens are chosen and when they end; temperature 0 is greedy."""

    max_new_tokens: int = 64  # tokens to generate at most
    temperature: float = 0.0  # of the sampler, 0 = greedy
    sample_top_k: int = 0  # sample among the k likeliest tokens, 0 = all
    top_p: float = 1.0  # sample among the likeliest tokens that hold this much probability
    seed: int = 0  # of the sampler; prompt j of a batch draws with seed + j


@dataclass
class Options(Sampling):
    prompt: list[str] = field(default_factory=list)  # what to answer, - reads standard input; repeatable: one batch
    model: str = ""  # model folder, default tiny/
    pool: str = ""  # pool folder, default the model's own
    adapter: list[str] = field(default_factory=list)  # NAME=DIR, one more PEFT adapter; repeatable
    list_: bool = False  # print the pool and stop
    prompts: str = ""  # FILE.jsonl of {"prompt"} lines, and "method" where it is another; answered as one batch
    interactive: bool = False  # a prompt loop; /help there lists what else it takes
    method: list[str] = field(default_factory=list)  # base, adapter:NAME, meteora, ... (README); once, or one a prompt
    top_k: int = 2  # adapters a token uses (which gates: meteora_topK)
    gate_temperature: float = 1.0  # of MeteoRA's softmax over the k chosen adapters
    retrieve: int = 3  # adapters retrieved for a prompt (ramole, selection, mixture, fusion, logo)
    exclude: list[str] = field(default_factory=list)  # NAME of an adapter never to be used; repeatable
    encoder: str = ""  # sentence-transformers folder that finds them, instead of the base's hidden states
    resident: int = 0  # adapters in memory at most, the others wait on disk; 0 = all
    raw: bool = False  # no prompt template
    chat: bool = False  # the tokenizer's chat template instead of the pool's
    truncate: Literal["no", "left", "right"] = "no"  # which end of a prompt longer than the context is cut off
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    compile: bool | None = None  # the blocks, by torch.compile; default where many tokens of a large model pay for it
    routing: bool | None = None  # show each token's adapter in colour, default on a terminal
    html: str = ""  # write the routing as a web page to this file
    json: bool = False  # one JSON object a prompt on standard output


# For people who import it -------------------------------------------------------------------------------------------


@dataclass
class Token:
    """One generated token: the batch row it belongs to, the text that became whole with it, and the adapters that
    computed it, [[name, weight], ...] averaged over layers and modules. `finish` is set on a row's last token: "eos"
    (id is the EOS, no text of its own), "length" or "context"."""

    row: int
    id: int
    text: str
    adapters: list
    finish: str | None = None


def load(model=None, pool=None, adapters=None, dtype="auto", device="auto", resident=0) -> Mole:
    """A model folder (default tiny/) with its tokenizer and adapters: those of `pool` (default: the model's own) and
    `adapters` {name: PEFT folder}, at most `resident` of them in memory. Raises InputError for bad input."""
    return load_mole(model or TINY, pool, (adapters or {}).items(), dtype, device, resident)


def stream(mole, prompts, method=None, routing=False, raw=False, chat=False, truncate="no", top_k=2,
           gate_temperature=1.0, compile=None, k=3, exclude=(), **sampling) -> Iterator[Token]:  # fmt: skip
    """Answers a batch of prompts: yields Tokens as they come, row by row at each step.

    method: a name for all or a list, one a prompt; None is the best that the pool has the parts for. `routing` records
    which adapters computed each token, `compile` is for compile_blocks(). Methods that retrieve take the `k` best
    adapters for each prompt; those of `exclude` are not used. `sampling`: the fields of Sampling. Raises InputError for
    bad input, RuntimeError where another batch began on the same model before this one ended.
    """
    prompts, options = [prompts] if isinstance(prompts, str) else list(prompts), Sampling(**sampling)
    check_values(options, top_k, gate_temperature)
    if not prompts:
        return
    ids = [encode_prompt(mole, prompt, raw, chat, truncate) for prompt in prompts]
    method = default_method(mole, top_k)[0] if method is None else method
    methods = [method] * len(ids) if isinstance(method, str) else list(method)
    if len(methods) != len(ids):
        raise InputError(f"{len(methods)} methods for {len(ids)} prompts: give one, or one a prompt")
    for name in methods:
        check_method(mole, name, top_k)
    found = retrieve(mole, methods, prompts, k, exclude, ids)
    compile_blocks(mole.model, compile, options.max_new_tokens)
    set_methods(mole, methods, top_k, gate_temperature, retrieved=found, exclude=exclude)
    yield from (token for token in decode(mole, ids, options, routing) if isinstance(token, Token))


def compile_blocks(model, asked, tokens):
    """Compiles the model's blocks where that is asked for (False: no longer) or, `asked` None, where `tokens` decoded
    faster outweigh the wait for a compiler: about 0.2 ns a parameter and token (SmolLM2-135M, LOG.md) against ten
    seconds."""
    pays = tokens * sum(p.numel() for p in model.parameters()) * 2e-10 > 10
    if asked or (asked is None and pays):
        model.model.compile()
    elif asked is False:
        model.model.uncompile()


def check_values(sampling, top_k, gate_temperature):
    """Raises InputError for values that no sampler or gate can use."""
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("sample_top_k", 0)):
        if not getattr(sampling, name) >= least:
            raise InputError(f"--{name} is {getattr(sampling, name)}, expected at least {least}")
    if not -(2**63) <= sampling.seed < 2**63:
        raise InputError(f"--seed is {sampling.seed}, expected a number of 64 bits")
    if not 0 < sampling.top_p <= 1:
        raise InputError(f"--top_p is {sampling.top_p}, expected more than 0 and at most 1")
    if not top_k >= 1:
        raise InputError(f"--top_k is {top_k}, expected at least 1")
    if not gate_temperature > 0:
        raise InputError(f"--gate_temperature is {gate_temperature}, expected more than 0")


def answer(mole, prompts, **options):
    """stream(), waited for: the list of answers' texts."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [""] * len(prompts)
    for token in stream(mole, prompts, **options):
        texts[token.row] += token.text
    return texts


def encode_prompt(mole, prompt, raw=False, chat=False, truncate="no"):
    """Prompt -> token ids, through the pool's template, the chat template or neither. Raises InputError for a prompt
    that is too long, empty where there is no BOS, or tokenized to ids that the model doesn't have."""
    tokenizer, config = mole.tokenizer, mole.model.config
    if chat:
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]), start=False)
    else:
        ids = tokenizer.encode(prompt if raw else fill(mole.template, prompt))
    if not ids:
        if tokenizer.bos_id is None:
            raise InputError("empty prompt, and this tokenizer has no BOS token to begin with")
        ids = [tokenizer.bos_id]
    check_ids(ids, config.vocab_size)
    room = config.max_position_embeddings
    if len(ids) > room:
        if truncate == "no":
            cuts = "generate.py --truncate left or right cuts it"
            raise InputError(f"the prompt has {len(ids)} tokens, the context {room}: {cuts}")
        start = ids[:1] if ids[0] == tokenizer.bos_id else []
        ids = ids[:room] if truncate == "right" else start + ids[len(ids) - room + len(start) :]
    return ids


def by_length(ids, size):
    """Batches of `size` prompts, the shortest first: lists of their positions in `ids`."""
    order = sorted(range(len(ids)), key=lambda j: len(ids[j]))
    return [order[start : start + size] for start in range(0, len(order), size)]


# Decoding -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decode(mole, ids, sampling, routing=False):
    """The loop: prefill the prompts `ids` (lists of token ids), then one token a row at a step. Yields first, where
    `routing`, the prompts' adapters (a list, one a row, of a list a token), then Tokens."""
    model, config, b = mole.model, mole.model.config, len(ids)
    device = model.model.embed_tokens.weight.device
    lengths = [len(row) for row in ids]
    room = config.max_position_embeddings
    capacity = max(lengths) + min(sampling.max_new_tokens, max(room - min(lengths), 0) + 1)  # the shortest fills it
    cache = KVCache(config, b, capacity, model.model.embed_tokens.weight.dtype, device)
    cache.steady = not mole.own  # a gate of yours may change as it likes
    padded = torch.zeros(b, max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(ids):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    counts = torch.tensor(lengths, device=device)
    mole.prompt.mask = torch.arange(padded.shape[1], device=device) < counts[:, None]
    with _recorder(mole, padded.numel(), routing) as recorder:
        hidden = model.model(padded.to(device), cache, counts)
    mole.prompt.mask, seen = None, None
    if routing:
        seen = [row[:n] for row, n in zip(_seen(mole, recorder, *padded.shape), lengths, strict=True)]
        yield seen
    logits = model.head(hidden[torch.arange(b, device=device), counts - 1])  # (b, v)
    generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(b)]
    turn, using, setting = mole.turn, mole.using, _setting(mole)
    texts, active = [TextStream(mole.tokenizer) for _ in ids], [sampling.max_new_tokens > 0] * b
    with _recorder(mole, b, routing) as recorder:
        for step in range(1, sampling.max_new_tokens + 1):
            chosen = choose(logits.float(), sampling, generators)
            for row, index in enumerate(chosen.tolist()):
                if active[row]:
                    full, eos = lengths[row] + step > room, index in mole.eos_ids
                    end = "length" if step == sampling.max_new_tokens else "context" if full else None
                    finish = "eos" if eos else end
                    text = "" if eos else texts[row].push(index)
                    text += texts[row].flush() if finish else ""
                    active[row] = finish is None
                    yield Token(row, index, text, seen[row][-1] if routing else [], finish)
            if not any(active):
                return
            if mole.turn != turn:
                raise RuntimeError("another batch began on this model: finish one stream before starting the next")
            if left := [name for name in using if mole.slots([name]) != {name: using[name]}]:
                raise RuntimeError(f"adapter {left[0]} left its slot while an answer used it")
            if _setting(mole) != setting:  # a compiled step has to look again
                cache.captured, setting = None, _setting(mole)
            counts = None if all(active) else torch.tensor(active, device=device).long()  # finished rows stand still
            logits = model.head(model.model(chosen[:, None], cache, counts)[:, 0])
            seen = _seen(mole, recorder, b, 1) if routing else None


def _setting(mole):
    """What may change between the steps of a batch: force() and a pool that grows."""
    return mole.setting, mole.pool and (mole.pool.capacity, mole.pool.rank)


def _recorder(mole, n, routing):
    """Records the routing of n tokens where that is asked for."""
    return Recorder(mole.model, n) if routing and mole.pool is not None else contextlib.nullcontext()


def _seen(mole, recorder, b, t):
    """The adapters of the last forward's tokens: a list, one a row, of a list a token."""
    if recorder is None:
        return [[[]] * t] * b
    flat = name_adapters(mole.attached[1], recorder.read(b * t).mean(0))
    return [flat[row * t :][:t] for row in range(b)]


def name_adapters(pool, weights):
    """(n, e) weights -> for each token [[name, weight], ...], heaviest first, those under 0.0005 left out."""
    names = {pool.slot(name): name for name in pool.resident}
    rows = []
    for row in weights.tolist():
        pairs = [[names[slot], round(w, 3)] for slot, w in enumerate(row) if w >= 0.0005 and slot in names]
        rows.append(sorted(pairs, key=lambda pair: -pair[1]))
    return rows


def choose(logits, sampling, generators):
    """Logits (b, v) float32 -> token ids (b,): greedy, or sampled after top-k and top-p, each row by its generator."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The largest is 0 at any temperature, of which float32 knows none smaller.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if 0 < sampling.sample_top_k < logits.shape[-1]:
        least = logits.topk(sampling.sample_top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probability = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probability.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first token always stays
        probability = probability.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    rows = zip(probability, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


# The command --------------------------------------------------------------------------------------------------------

START = """nanoMoLE: a Llama that carries many LoRA adapters and chooses among them, token by token.

  python generate.py --prompt "What is the plural of mouse?"     answer with the embedded model
  python generate.py --list                               the adapters it carries
  python generate.py --help                               every option
  python generate.py --model DIR --adapter NAME=DIR ...   your own Llama, your own PEFT adapters"""


def check_options(o, asked):
    """Raises InputError for options that exclude each other, and for values that nothing can use."""
    if o.raw and o.chat:
        raise InputError("--raw and --chat exclude each other")
    if len(o.method) > 1 and len(o.method) != len(asked):
        raise InputError(f"{len(o.method)} times --method for {len(asked)} prompts: give it once, or once a prompt")
    for name, least in (("retrieve", 1), ("resident", 0)):
        if getattr(o, name) < least:
            raise InputError(f"--{name} is {getattr(o, name)}, expected at least {least}")
    check_values(o, o.top_k, o.gate_temperature)
    if o.html and Path(o.html).is_dir():
        raise InputError(f"--html {o.html}: is a directory, expected a file to write")


def read_requests(o):
    """[(prompt, its own method or "")] of --prompt and --prompts. Raises InputError."""
    asked = [(read_prompt(prompt), "") for prompt in o.prompt]
    for row in read_jsonl(o.prompts, ("prompt",)) if o.prompts else []:
        if not isinstance(row.get("method", ""), str):
            raise InputError(f"{o.prompts}: method is {row['method']!r}, expected the name of one")
        asked.append((row["prompt"], row.get("method", "")))
    return asked


def read_adapters(pairs):
    """["NAME=DIR", ...] -> [(name, folder), ...]."""
    named = []
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--adapter is {pair!r}, expected NAME=DIR")
        if name in dict(named):
            raise InputError(f"adapter name {name!r} twice: {dict(named)[name]} and {folder}")
        named.append((name, folder))
    return named


def read_prompt(prompt):
    """The prompt, or standard input for "-". Raises InputError where it is not UTF-8: no tokenizer could encode it."""
    name, data = "--prompt", prompt.encode("utf-8", "surrogateescape")
    if prompt == "-":
        name, data = "standard input", sys.stdin.buffer.read().removesuffix(b"\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}") from None


def print_pool(mole):
    if not (mole.pool and mole.pool.members):
        print("no adapters")
        return
    width = max(map(len, mole.pool.names))
    for name in mole.pool.names:
        member = mole.pool.members[name]
        modules = " ".join(sorted({path.rpartition(".")[2] for path in member.adapter.scale}))
        r, alpha = member.adapter.config["r"], member.adapter.config["lora_alpha"]
        modules = "all Linears" if len(member.adapter.scale) == len(mole.shapes) else modules
        sample = "  ".join(member.adapter.samples[:1]).partition("\n")[0]  # a prompt that it was trained on
        where = member.hash[:12] if member.slot is not None else "on disk     "
        print(f"{name:<{width}}  r {r}  alpha {alpha}  {where}  {modules}  {sample}".rstrip())


def result(prompt, method, tokens, prompt_trace, seconds, retrieved):
    """The JSON object of one answer; its tokens' texts joined are its text."""
    kept = [{"id": t.id, "text": t.text, "adapters": t.adapters} for t in tokens if t.finish != "eos"]
    if kept and tokens[-1].finish == "eos":  # a character that the EOS cut short
        kept[-1]["text"] += tokens[-1].text
    return {
        "prompt": prompt,
        "text": "".join(t.text for t in tokens),
        "method": method,
        "finish_reason": tokens[-1].finish,
        "tokens": kept,
        "prompt_tokens": prompt_trace,
        "retrieved": retrieved,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(tokens) / seconds, 2),
    }


def trace_prompt(mole, ids, adapters):
    """A prompt's tokens as JSON wants them."""
    texts = TextStream(mole.tokenizer)
    rows = [{"id": i, "text": texts.push(i), "adapters": a} for i, a in zip(ids, adapters, strict=True)]
    rows[-1]["text"] += texts.flush()
    return rows


def main():
    o = parse_args(Options, description="Answer prompts with a Llama that chooses among its LoRA adapters.")
    asked = read_requests(o)
    if not (o.prompt or o.prompts or o.list_ or o.interactive):
        print(START)
        return
    check_options(o, asked)
    adapters = read_adapters(o.adapter)
    embed = sentence_encoder(o.encoder) if o.encoder else None
    mole = load_mole(o.model or TINY, o.pool or None, adapters, o.dtype, o.device, o.resident)
    mole.embed = embed
    if o.list_:
        print_pool(mole)
        return
    for name in o.exclude:
        if not mole.pool:
            raise InputError(f"--exclude {name}: there are no adapters")
        mole.pool.member(name)
    name, why = default_method(mole, o.top_k)
    if name.startswith("meteora_top") and o.top_k != Options.top_k:
        name = "meteora"  # k was asked for: no other gates will do
    chosen = [check_method(mole, m, o.top_k) for m in (o.method or [name])]
    print(f"method: {', '.join(chosen)}" + ("" if o.method else f" ({why})"), file=sys.stderr)
    if asked:
        chosen = chosen if len(chosen) == len(asked) else chosen * len(asked)
        methods = [check_method(mole, own, o.top_k) if own else m for (_, own), m in zip(asked, chosen, strict=True)]
        respond(mole, [prompt for prompt, _ in asked], methods, o)
    if o.interactive:
        interact(mole, chosen[0], o)


def respond(mole, prompts, methods, o):
    """Decodes a batch and shows it as asked: streamed text, JSON lines, a web page."""
    ids = [encode_prompt(mole, prompt, o.raw, o.chat, o.truncate) for prompt in prompts]
    found = retrieve(mole, methods, prompts, o.retrieve, o.exclude, ids)
    compile_blocks(mole.model, o.compile, o.max_new_tokens)
    set_methods(mole, methods, o.top_k, o.gate_temperature, retrieved=found, exclude=o.exclude)
    for pairs in found:
        if pairs:
            print("retrieved: " + ", ".join(f"{name} {score:.3f}" for name, score in pairs), file=sys.stderr)
    routing = sys.stdout.isatty() and "NO_COLOR" not in os.environ if o.routing is None else o.routing
    recording = bool((routing and not o.json) or o.json or o.html)
    begin, tokens, seconds = time.perf_counter(), [[] for _ in prompts], [0.0] * len(prompts)
    events = decode(mole, ids, Sampling(*(getattr(o, f.name) for f in fields(Sampling))), recording)
    seen = next(events) if recording else [[[]] * len(row) for row in ids]
    prompt_traces = [trace_prompt(mole, row, adapters) for row, adapters in zip(ids, seen, strict=True)]
    pairs = [[(t["text"], t["adapters"]) for t in trace] for trace in prompt_traces]
    printer = None if o.json else Printer(prompts, pairs, routing)
    for token in events:
        tokens[token.row].append(token)
        seconds[token.row] = time.perf_counter() - begin
        if printer:
            printer.push(token)
    if printer:
        printer.close()
    if o.json:
        for row, prompt in enumerate(prompts):
            line = result(prompt, methods[row], tokens[row], prompt_traces[row], seconds[row], found[row])
            print(json.dumps(line, ensure_ascii=False), flush=True)
    if o.html:
        answers = [[(t.text, t.adapters) for t in row] for row in tokens]
        write_text(o.html, html_page(list(zip(pairs, answers, strict=True)), "Which adapter computed which token"))


HELP = """/add NAME=DIR    one more PEFT adapter    /adapters     what the pool holds
/remove NAME     one less                 /method M     how to choose from now on (ramole, meteora, adapter:NAME, ...)
/quit, Ctrl-D    leave                    anything else is a prompt"""


def interact(mole, method, o):
    """A prompt loop; between prompts the pool and the method may change. Ctrl-C stops an answer."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of another encoding: an error of that prompt alone
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if word == "/add":
                [(name, folder)] = read_adapters([rest])
                add_adapter(mole, name, folder)
            elif word == "/remove":
                if mole.pool is None:
                    raise InputError("there are no adapters")
                mole.pool.remove(rest)
            elif word == "/method":
                method = check_method(mole, rest, o.top_k)
            elif word == "/adapters":
                print_pool(mole)
            elif word in ("/quit", "/exit"):
                return
            elif word.startswith("/"):
                print(HELP)
            elif line:
                respond(mole, [line], [check_method(mole, method, o.top_k)], o)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
