"""Prompts to token ids, and to batches of them."""

from collections.abc import Sequence

from common.files import InputError, warn
from common.template import CHAT, RAW, encode_wrapped
from common.tokenizer import check_ids
from methods.session import Mole


def encode_prompt(mole: Mole, prompt: str, raw: bool = False, chat: bool = False,
                  truncate: str = "no", before: Sequence[dict] = ()) -> list[int]:  # fmt: skip
    """Prompt -> token ids, wrapped in the model's template, or as it is (`raw`), or in the chat
    template (`chat`), where the messages `before` come first. Raises InputError for a prompt that is
    too long, that is empty where there is no BOS, or whose ids the model doesn't have."""
    tokenizer = mole.tokenizer
    config = mole.model.config
    template = CHAT if chat else RAW if raw else mole.template
    ids = encode_wrapped(tokenizer, template, prompt, before)
    if not ids:
        if tokenizer.bos_id is None:
            raise InputError("empty prompt, and this tokenizer has no BOS token to begin with")
        ids = [tokenizer.bos_id]
    check_ids(ids, config.vocab_size)
    context = config.context
    if len(ids) > context:
        if truncate == "no":
            cuts = "generate.py --truncate left or right cuts it"
            raise InputError(f"the prompt has {len(ids)} tokens, the context {context}: {cuts}")
        start = ids[:1] if ids[0] == tokenizer.bos_id else []
        tail = ids[len(ids) - context + len(start) :]
        ids = ids[:context] if truncate == "right" else start + tail
    return ids


def warn_of_empty(mole: Mole, prompts: list[str]) -> None:
    """Warns, once for a batch, where prompts are empty, and says what is answered instead."""
    if empty := prompts.count(""):
        which = "the prompt is" if len(prompts) == 1 else f"{empty} of {len(prompts)} prompts are"
        rest = "the BOS token" if mole.template == RAW else "the template"
        warn(f"{which} empty: answered from {rest} alone")


def by_length(ids: list[list[int]], size: int) -> list[list[int]]:
    """Batches of `size` prompts, the shortest first: lists of their positions in `ids`."""
    order = sorted(range(len(ids)), key=lambda j: len(ids[j]))
    return [order[start : start + size] for start in range(0, len(order), size)]
