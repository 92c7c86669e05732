"""The decode loop: a batch of prompts in, tokens out, each with the adapters that computed it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.tokenizer import TextStream
from decoding.sampling import Sampling, sample
from methods.session import Mole
from moe_lora import Recorder
from pool.slots import Pool


@dataclass
class Token:
    """One generated token: its batch row, its id, the text that became whole with it, and the
    adapters that computed it, [[name, weight], ...], averaged over layers and modules. `finish` is
    set on a row's last token: "eos" (id is the EOS, no text of its own), "length" or "context"."""

    row: int
    id: int
    text: str
    adapters: list
    finish: str | None = None


@torch.inference_mode()
def decode(mole: Mole, ids: list[list[int]], sampling: Sampling, routing: bool = False) -> Iterator:
    """Prefills the prompts `ids` (token ids), then generates one token a row at each step. Yields
    Tokens and, with `routing`, before them the prompts' adapters: a list for each row that holds a
    list for each token."""
    model = mole.model
    b = len(ids)
    device = mole.device
    lengths = list(map(len, ids))
    context = model.config.max_position_embeddings
    room = max(context - min(lengths), 0) + 1  # tokens until the shortest prompt fills the context
    cache = model.new_cache(b, max(lengths) + min(sampling.max_new_tokens, room))
    padded = torch.zeros(b, max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(ids):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    counts = torch.tensor(lengths, device=device)
    mole.prompt.mask = torch.arange(padded.shape[1], device=device) < counts[:, None]
    with _recorder(mole, padded.numel(), routing) as recorder:
        hidden = model.model(padded.to(device), cache, counts)
    mole.prompt.mask = None
    adapters = None
    if routing:
        padded_adapters = _read_adapters(mole, recorder, *padded.shape)
        adapters = [row[:n] for row, n in zip(padded_adapters, lengths, strict=True)]
        yield adapters
    logits = model.head(hidden[torch.arange(b, device=device), counts - 1])  # (b, v)
    generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(b)]
    batch_id = mole.batch_id
    in_use = mole.slots_in_use
    texts = [TextStream(mole.tokenizer) for _ in ids]
    active = [sampling.max_new_tokens > 0] * b
    with _recorder(mole, b, routing) as recorder:
        for step in range(1, sampling.max_new_tokens + 1):
            chosen = sample(logits.float(), sampling, generators)
            for row, index in enumerate(chosen.tolist()):
                if not active[row]:
                    continue
                finish = None
                if index in mole.eos_ids:
                    finish = "eos"
                elif step == sampling.max_new_tokens:
                    finish = "length"
                elif lengths[row] + step > context:
                    finish = "context"
                text = "" if finish == "eos" else texts[row].push(index)
                text += texts[row].flush() if finish else ""
                active[row] = finish is None
                yield Token(row, index, text, adapters[row][-1] if routing else [], finish)
            if not any(active):
                return
            _check_batch(mole, batch_id, in_use)
            cache.replayable = _replay_key(mole)
            # A finished row adds nothing to the cache.
            counts = None if all(active) else torch.tensor(active, device=device).long()
            logits = model.head(model.model(chosen[:, None], cache, counts)[:, 0])
            adapters = _read_adapters(mole, recorder, b, 1) if routing else None


def _check_batch(mole, batch_id, in_use):
    """Raises RuntimeError where another batch began, or an adapter of `in_use` left its slot."""
    if mole.batch_id != batch_id:
        raise RuntimeError("another batch began on this model: finish one stream before starting the next")
    for name, slot_and_hash in in_use.items():
        if mole.slots([name]) != {name: slot_and_hash}:
            raise RuntimeError(f"adapter {name} left its slot while an answer used it")


def _replay_key(mole):
    """KVCache.replayable: changes when force_adapters() is called or the pool grows between steps;
    None with custom gates, which may change at any step."""
    if mole.custom_gates:
        return None
    return mole.force_count, mole.pool and (mole.pool.capacity, mole.pool.rank)


def _recorder(mole, n, routing):
    """Records the routing of n tokens where that is asked for."""
    return Recorder(mole.model, n) if routing and mole.pool is not None else contextlib.nullcontext()


def _read_adapters(mole, recorder, b, t):
    """The adapters of the last forward's tokens: for each row a list, for each token in it one."""
    if recorder is None:
        return [[[]] * t] * b
    flat = name_adapters(mole.attached[1], recorder.read(b * t).mean(0))
    return [flat[row * t :][:t] for row in range(b)]


def name_adapters(pool: Pool, weights: torch.Tensor) -> list[list]:
    """(n, e) weights -> for each token [[name, weight], ...], heaviest first, none under 0.0005."""
    names = {pool.slot(name): name for name in pool.resident}
    rows = []
    for row in weights.tolist():
        pairs = []
        for slot, weight in enumerate(row):
            if weight >= 0.0005 and slot in names:
                pairs.append([names[slot], round(weight, 3)])
        rows.append(sorted(pairs, key=lambda pair: -pair[1]))
    return rows
