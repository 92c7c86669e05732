"""For people who import it: load() gives a model with its adapters, stream() its tokens as they
come, answer() whole answers."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from common.files import InputError
from common.hub import find_folder
from common.template import check_template
from decoding.loop import Token, decode, tokens_until_full
from decoding.prompts import encode_prompt
from decoding.sampling import Sampling, check_values
from methods.batch import check_method, default_method, retrieve, set_methods
from methods.session import Mole, find_mole, load_weights
from pool.load import TINY, compile_blocks


def load(model: str | Path | None = None, pool: str | Path | None = None,
         adapters: dict | None = None, dtype: str = "auto", device: str = "auto",
         resident: int = 0, fast: bool = True, template: str = "") -> Mole:  # fmt: skip
    """A model folder (default tiny/) with its tokenizer and adapters: those of `pool` (default: the
    model's own) and `adapters` {name: PEFT folder}, at most `resident` of them in memory, 0 = all.
    Models and adapters may be named as on the hub, ORG/NAME[@REVISION]. `fast` False leaves out
    what is there for speed alone. `template` wraps prompts: a text that holds {prompt}, or "chat";
    by default the pool's. Raises InputError for bad input."""
    if template:
        check_template(template, "load()")
    extra = [(name, find_folder(path, "adapter")) for name, path in (adapters or {}).items()]
    mole = find_mole(model or TINY, pool, extra, template)
    return load_weights(mole, dtype, device, resident, fast)


def stream(mole: Mole, prompts: str | list[str], method: str | list[str] | None = None,
           routing: bool = False, raw: bool = False, chat: bool = False, truncate: str = "no",
           top_k: int = 2, gate_temperature: float = 1.0, compile: bool | None = None, k: int = 3,
           exclude: Iterable[str] = (), stops: list[list[str]] | None = None,
           **sampling) -> Iterator[Token]:  # fmt: skip
    """Answers a batch of prompts: yields Tokens as they come, row by row at each step.

    method: a name for all or a list, one a prompt; None is the best that the pool has the parts
    for. `routing` records which adapters computed each token, `compile` is for compile_for().
    Methods that retrieve take the `k` best adapters for each prompt; those of `exclude` are not
    used. `sampling`: the fields of Sampling; `stops`, one list a prompt, instead of its `stop`.

    A model serves one batch at a time. Threads may share it: setting up and each step hold
    mole.lock. Between steps another batch may begin, which ends this one: its next step raises
    RuntimeError. Use answer() where others are to wait. Raises InputError for bad input.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    options = Sampling(**sampling)
    check_values(options, top_k, gate_temperature)
    if not prompts:
        return
    ids = [encode_prompt(mole, prompt, raw, chat, truncate) for prompt in prompts]
    method = default_method(mole, top_k)[0] if method is None else method
    methods = [method] * len(ids) if isinstance(method, str) else list(method)
    if len(methods) != len(ids):
        raise InputError(f"{len(methods)} methods for {len(ids)} prompts: give one, or one a prompt")
    with mole.lock:
        for name in methods:
            check_method(mole, name, top_k)
        found = retrieve(mole, methods, prompts, k, exclude, ids)
        compile_for(mole, compile, ids, options)
        set_methods(mole, methods, top_k, gate_temperature, retrieved=found, exclude=exclude)
        events = decode(mole, ids, options, routing, stops)
    if routing:
        next(events)  # the adapters of the prompts' own tokens
    yield from events


def answer(mole: Mole, prompts: str | list[str], **options) -> list[str]:
    """The answers' whole texts as they were generated, white space at their ends kept; `options`
    are those of stream(). Holds mole.lock throughout, so that other threads wait."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [""] * len(prompts)
    with mole.lock:
        for token in stream(mole, prompts, **options):
            texts[token.row] += token.text
    return texts


def compile_for(mole: Mole, asked: bool | None, ids: list[list[int]], sampling: Sampling) -> None:
    """Compiles the model's blocks where `asked` (False: no longer) or, with None, where answering
    the prompts `ids` pays for it.

    It pays where the steps, of which the context allows only so many, save more than the ten
    seconds of compiling, at about 0.2 ns a parameter and step (SmolLM2-135M, LOG.md)."""
    steps = min(sampling.max_new_tokens, tokens_until_full(mole, min(map(len, ids))))
    parameters = sum(map(torch.Tensor.numel, mole.model.parameters()))
    compile_blocks(mole.model, asked, saves=steps * parameters * 2e-10, costs=10)
