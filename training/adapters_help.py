"""Do the adapters lower the loss of their own tasks? Asked before anything learns to choose among
them: with a wrong prompt template, or on another base, they don't, and nothing else shows it."""

import torch

from common.files import InputError, warn
from common.template import CHAT, RAW, TEMPLATE
from common.tokenizer import Tokenizer
from model import Llama
from moe_lora import KnownAdapterGate, attach, detach
from pool.slots import Pool
from tasks.folders import Example, PackedExample, collate, draw, encode, micro_batches
from training.losses import lm_losses

Examples = dict[str, list[Example | PackedExample]]  # {task: its examples}
TOKENS = 2048  # measured: the time of a few training steps
BETTER = 0.9  # of the loss: another template is said to fit better


def check_adapters_help(
    model: Llama,
    tokenizer: Tokenizer,
    pool: Pool,
    examples: Examples,
    template: str,
    seed: int,
) -> None:
    """Warns of each adapter that doesn't lower the loss of its own task's first examples, and of
    those that fit another template much better than `template`.

    Raises InputError where no adapter helps: then the template or the base is not the one they were
    trained with, and whatever learns to choose among them learns nothing.
    """
    first = first_examples(examples, seed)
    losses = own_losses(model, pool, first)
    for other, again in losses_with_others(model, tokenizer, pool, first, template).items():
        better = []
        for name, loss in again.items():
            own = losses[name][0]
            if loss < BETTER * own:
                better.append(f"{name} {loss:.2f} / {own:.2f}")
        if better:
            found = f"loss with {other!r} / with this run's {template!r}: {', '.join(better)}"
            warn(f"these fit another template better: {found}: were they trained with it?")
    why = f"template {template!r}; were they trained with another one, or on another base?"
    worse = {name: pair for name, pair in losses.items() if not pair[0] < pair[1]}
    if len(worse) == len(losses):
        shown = ", ".join(f"{name} {own:.2f} / {base:.2f}" for name, (own, base) in worse.items())
        found = f"no adapter lowers the loss of its own examples (with it / without: {shown})"
        raise InputError(f"{found}: {why}")
    for name, (own, base) in worse.items():
        found = f"loss {own:.2f} with it, {base:.2f} without"
        warn(f"adapter {name} doesn't help on its own examples: {found} ({why})")


def losses_with_others(
    model: Llama, tokenizer: Tokenizer, pool: Pool, first: Examples, template: str
) -> dict[str, dict[str, float]]:
    """{another template: {adapter: its loss with it}}, of the templates in common use.

    A wrong template makes the base worse as well, so that adapters seem to help all the same.
    """
    found = {}
    common = [TEMPLATE, RAW] + [CHAT] * ("default" in tokenizer.chat_templates)
    for other in common:
        again = {}
        for name, some in first.items():
            again[name] = [encode(tokenizer, other, example.row, name) for example in some]
        longest = max(len(example.ids) for some in again.values() for example in some)
        if other != template and longest <= model.config.context:
            losses = own_losses(model, pool, again, (1.0,))
            found[other] = {name: loss for name, (loss,) in losses.items()}
    return found


@torch.no_grad()
def own_losses(
    model: Llama, pool: Pool, first: Examples, weights=(1.0, 0.0), tokens: int = TOKENS
) -> dict[str, tuple[float, ...]]:
    """{adapter: the mean loss of its examples' response tokens, with it at each of `weights`}; at
    weight 0 that is the base's. A forward has at most `tokens` tokens.

    The model must have no adapters attached, and has none afterwards; no random number is drawn, so
    training goes on as without this.
    """
    gate = KnownAdapterGate()
    attach(model, pool, gate)
    losses = {}
    for name, some in first.items():
        total = torch.zeros(len(weights))
        count = 0
        for part in micro_batches(some, tokens):
            batch = collate(part, model.head_weight.device)
            slots = batch.slots(pool)[batch.real]
            for column, weight in enumerate(weights):
                gate.set(slots, torch.full(slots.shape, weight, device=slots.device))
                total[column] += lm_losses(model, batch).sum().item()
            count += int(batch.predicts.sum())
        losses[name] = tuple((total / count).tolist())
    detach(model)
    return losses


def first_examples(examples: Examples, seed: int, tokens: int = TOKENS) -> Examples:
    """What a run sees first: an example of each task in turn, up to eight rounds, and as long as
    they have at most `tokens` tokens."""
    first = {}
    total = 0
    for turn in range(8):
        for name in sorted(examples):
            if turn < len(examples[name]):
                (example,) = draw(examples[name], name, turn, 1, seed)
                total += len(example.ids)
                if total > tokens and first:
                    return first
                first.setdefault(name, []).append(example)
    return first
