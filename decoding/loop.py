"""The decode loop: a batch of prompts in, tokens out, each with the adapters that computed it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from common.files import InputError
from common.tensors import dtype_name
from common.tokenizer import TextStream
from decoding.sampling import Sampling, sample
from methods.session import Mole
from moe_lora import Recorder
from pool.slots import Pool


@dataclass
class Token:
    """One generated token: its batch row, the text that became whole with it, and the adapters that
    computed it, [[name, weight], ...] averaged over layers and modules. `finish` is set on a row's
    last token: "eos" (id is the EOS, no text of its own), "stop", "length" or "context"."""

    row: int
    id: int
    text: str
    adapters: list
    finish: str | None = None


def decode(mole: Mole, ids: list[list[int]], sampling: Sampling, routing: bool = False,
           stops: list[list[str]] | None = None,
           watch: Callable[[torch.Tensor], None] | None = None) -> Iterator:  # fmt: skip
    """Prefills the prompts `ids` (token ids) and returns what generates one token a row at each
    step: yields Tokens and, with `routing`, before them the prompts' adapters: a list for each row
    that holds a list for each token. A row ends before one of its `stops`, by default sampling's.
    With `routing`, `watch` is called after each forward with its tokens' weights in m gated Linears
    before they are averaged: (m, b, t, e), the prompts' first, then with t = 1 each step's.

    Prefill and each step hold mole.lock, which is free between steps: an iterator that is left
    half-way blocks nobody. Raises InputError for logits that aren't finite, RuntimeError where
    another batch began on this model before this one ended.
    """
    with mole.lock:
        stops = stops or [sampling.stop] * len(ids)
        batch = DecodeBatch(mole, ids, sampling, routing, stops, watch)
    return batch.events()


class DecodeBatch:
    """Prompts that are answered together: their cache, and what the next step goes on from."""

    @torch.inference_mode()
    def __init__(self, mole, ids, sampling, routing, stops, watch=None):
        b = len(ids)
        self.mole = mole
        self.sampling = sampling
        self.watch = watch
        self.id = mole.batch_id
        self.in_use = mole.slots_in_use
        self.lengths = list(map(len, ids))
        self.context = mole.model.config.context
        longest = max(self.lengths)
        room = tokens_until_full(mole, min(self.lengths))
        self.cache = mole.model.new_cache(b, longest + min(sampling.max_new_tokens, room))
        padded = torch.zeros(b, longest, dtype=torch.int64)
        for row, prompt in enumerate(ids):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        counts = torch.tensor(self.lengths, device=mole.device)
        mole.prompt.mask = torch.arange(longest, device=mole.device) < counts[:, None]
        with _recorder(mole, padded.numel(), routing) as recorder:
            hidden = mole.model.model(padded.to(mole.device), self.cache, counts)
        mole.prompt.mask = None
        self.logits = mole.model.head(hidden[torch.arange(b, device=mole.device), counts - 1])  # (b, v)
        self.prompt_adapters = None
        self.adapters = [[]] * b  # of each row's last token
        if routing:
            rows = zip(_read_adapters(mole, recorder, b, longest, watch), self.lengths, strict=True)
            self.prompt_adapters = [row[:n] for row, n in rows]
            self.adapters = [row[-1] for row in self.prompt_adapters]
        self.recorder = _recorder(mole, b, routing)
        self.generators = []
        for row in range(b):
            self.generators.append(torch.Generator(mole.device).manual_seed(sampling.seed + row))
        self.texts = [AnswerText(mole.tokenizer, some) for some in stops]
        self.active = [sampling.max_new_tokens > 0] * b
        self.steps = 0
        self.chosen = None  # (b,) the last step's token ids

    def events(self) -> Iterator:
        """What decode() yields."""
        if self.prompt_adapters is not None:
            yield self.prompt_adapters
        while any(self.active):
            with self.mole.lock:
                tokens = self.step()
            yield from tokens

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next token of each row that hasn't ended."""
        self.check()
        if self.chosen is not None:
            self.forward()
        self.chosen = sample(self.logits.float(), self.sampling, self.generators)
        self.steps += 1
        tokens = []
        for row, index in enumerate(self.chosen.tolist()):
            if self.active[row]:
                tokens.append(self.token(row, index))
        return tokens

    def check(self) -> None:
        """Raises RuntimeError where another batch began, or an adapter in use left its slot."""
        if self.mole.batch_id != self.id:
            raise RuntimeError(
                "another batch began on this model: finish one stream before starting the next"
            )
        for name, slot_and_hash in self.in_use.items():
            if self.mole.slots([name]) != {name: slot_and_hash}:
                raise RuntimeError(f"adapter {name} left its slot while an answer used it")

    def forward(self) -> None:
        """The last step's tokens through the model: new logits, and their adapters."""
        mole = self.mole
        self.cache.replayable = _replay_key(mole)
        counts = None
        if not all(self.active):  # a row that has ended adds nothing to the cache
            counts = torch.tensor(self.active, device=mole.device).long()
        with self.recorder as recorder:
            ids = self.chosen.clamp(min=0)[:, None]  # -1: not finite, of a row that has ended
            self.logits = mole.model.head(mole.model.model(ids, self.cache, counts)[:, 0])
        if self.prompt_adapters is not None:
            rows = _read_adapters(mole, recorder, len(ids), 1, self.watch)
            self.adapters = [row[0] for row in rows]

    def token(self, row: int, index: int) -> Token:
        """The Token of a row's new id, which may be its last. Raises InputError for -1."""
        if index < 0:
            dtype = dtype_name(self.mole.dtype)
            advice = "--dtype bfloat16 or float32 hold larger numbers"
            if dtype != "float16":
                advice = "see whether it is so with --method base; if not, an adapter is too large"
            raise InputError(f"prompt {row + 1}: logits are not finite in {dtype}: {advice}")
        finish = None
        if index in self.mole.eos_ids:
            finish = "eos"
        elif self.steps == self.sampling.max_new_tokens:
            finish = "length"
        elif self.lengths[row] + self.steps > self.context:
            finish = "context"
        text = self.texts[row]
        shown = "" if finish == "eos" else text.push(index)
        shown += text.flush() if finish else ""
        finish = "stop" if text.stopped else finish
        self.active[row] = finish is None
        return Token(row, index, shown, self.adapters[row], finish)


def tokens_until_full(mole: Mole, length: int) -> int:
    """The most tokens that an answer to a prompt of `length` tokens can have."""
    return max(mole.model.config.context - length, 0) + 1


class AnswerText(TextStream):
    """A TextStream that ends before the first of `stops`: text that may begin one is held back."""

    def __init__(self, tokenizer, stops: list[str]):
        super().__init__(tokenizer)
        self.stops = stops
        self.held = ""
        self.stopped = False

    def push(self, index: int | None, last: bool = False) -> str:
        """One more token id -> the text that is now whole and certain to be before any stop."""
        if self.stopped:
            return ""
        self.held += super().push(index, last)
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.stopped = True
            shown = self.held[: min(found)]
            self.held = ""
            return shown
        keep = 0 if last else max(map(self._begun, self.stops), default=0)
        shown = self.held[: len(self.held) - keep]
        self.held = self.held[len(shown) :]
        return shown

    def _begun(self, stop):
        """How many characters of `stop` the held text ends with."""
        for n in range(min(len(stop) - 1, len(self.held)), 0, -1):
            if self.held.endswith(stop[:n]):
                return n
        return 0


def _replay_key(mole):
    """KVCache.replayable: changes when force_adapters() is called or the pool grows between steps;
    None with custom gates, which may change at any step."""
    if mole.custom_gates:
        return None
    return mole.force_count, mole.pool and (mole.pool.capacity, mole.pool.rank)


def _recorder(mole, n, routing):
    """What records the routing of n tokens, where that is asked for."""
    return Recorder(mole.model, n) if routing and mole.pool is not None else contextlib.nullcontext()


def _read_adapters(mole, recorder, b, t, watch):
    """The adapters of the last forward's tokens: for each row a list, for each token in it one.
    `watch` gets their weights in each Linear."""
    if recorder is None:
        return [[[]] * t] * b
    weights = recorder.read(b * t)  # (m, n, e)
    if watch:
        watch(weights.unflatten(1, (b, t)))
    flat = name_adapters(mole.attached[1], weights.mean(0))
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
