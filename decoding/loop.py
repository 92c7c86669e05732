"""The decode loop: a batch of prompts in, tokens out, each with the adapters that computed it."""

import contextlib
from dataclasses import dataclass

import torch

from common.tokenizer import TextStream
from decoding.sampling import sample
from moe_lora import Recorder


@dataclass
class Token:
    """One generated token: the batch row it belongs to, the text that became whole with it, and the
    adapters that computed it, [[name, weight], ...] averaged over layers and modules. `finish` is
    set on a row's last token: "eos" (id is the EOS, no text of its own), "length" or "context"."""

    row: int
    id: int
    text: str
    adapters: list
    finish: str | None = None


@torch.inference_mode()
def decode(mole, ids, sampling, routing=False):
    """The loop: prefill the prompts `ids` (lists of token ids), then one token a row at a step.
    Yields first, where `routing`, the prompts' adapters (a list, one a row, of a list a token),
    then Tokens."""
    model = mole.model
    config = mole.model.config
    b = len(ids)
    device = model.model.embed_tokens.weight.device
    lengths = [len(row) for row in ids]
    room = config.max_position_embeddings
    capacity = max(lengths) + min(
        sampling.max_new_tokens, max(room - min(lengths), 0) + 1
    )  # the shortest fills it
    cache = model.new_cache(b, capacity)
    padded = torch.zeros(b, max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(ids):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    counts = torch.tensor(lengths, device=device)
    mole.prompt.mask = torch.arange(padded.shape[1], device=device) < counts[:, None]
    with _recorder(mole, padded.numel(), routing) as recorder:
        hidden = model.model(padded.to(device), cache, counts)
    mole.prompt.mask = None
    seen = None
    if routing:
        seen = [row[:n] for row, n in zip(_seen(mole, recorder, *padded.shape), lengths, strict=True)]
        yield seen
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
                if active[row]:
                    full = lengths[row] + step > room
                    eos = index in mole.eos_ids
                    end = "length" if step == sampling.max_new_tokens else "context" if full else None
                    finish = "eos" if eos else end
                    text = "" if eos else texts[row].push(index)
                    text += texts[row].flush() if finish else ""
                    active[row] = finish is None
                    yield Token(row, index, text, seen[row][-1] if routing else [], finish)
            if not any(active):
                return
            if mole.batch_id != batch_id:
                raise RuntimeError(
                    "another batch began on this model: finish one stream before starting the next"
                )
            if left := [name for name in in_use if mole.slots([name]) != {name: in_use[name]}]:
                raise RuntimeError(f"adapter {left[0]} left its slot while an answer used it")
            cache.replayable = _fixed(mole)
            counts = (
                None if all(active) else torch.tensor(active, device=device).long()
            )  # finished rows stand still
            logits = model.head(model.model(chosen[:, None], cache, counts)[:, 0])
            seen = _seen(mole, recorder, b, 1) if routing else None


def _fixed(mole):
    """What may change between the steps of a batch, force_adapters() and a pool that grows, as
    KVCache.replayable: None, where a gate of yours may change as it likes."""
    return (
        None if mole.custom_gates else (mole.force_count, mole.pool and (mole.pool.capacity, mole.pool.rank))
    )


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
    """(n, e) weights -> for each token [[name, weight], ...], heaviest first, those under 0.0005
    left out."""
    names = {pool.slot(name): name for name in pool.resident}
    rows = []
    for row in weights.tolist():
        pairs = [[names[slot], round(w, 3)] for slot, w in enumerate(row) if w >= 0.0005 and slot in names]
        rows.append(sorted(pairs, key=lambda pair: -pair[1]))
    return rows
