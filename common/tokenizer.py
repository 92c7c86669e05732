"""`tokenizer.json` (tokenizers) or `tokenizer.model` (sentencepiece) behind the same few methods;
chat templates.

The two libraries do the work; what is here is what they leave open: whether a BOS goes in front
(once, never twice: a doubled BOS shifts every position), which ids end a text, chat templates in a
sandbox, and text that streams out in whole characters.
"""

import json
import re
from pathlib import Path

from common.files import InputError, check_text, read_json, read_known, read_text


def check_ids(ids, vocab_size):
    """Raises InputError where an id is beyond the model's embedding."""
    if max(ids) >= vocab_size:
        raise InputError(
            f"token id {max(ids)}, but the model has {vocab_size}: wrong tokenizer for this model"
        )


class Tokenizer:
    """encode, decode, chat. `bos_id` and `eos_id` may be None; `adds_bos` says whether texts begin
    with BOS."""

    def __init__(self, folder):
        folder = Path(folder)
        self.config_file = folder / "tokenizer_config.json"
        self.config = read_json(self.config_file) if self.config_file.exists() else {}
        if (folder / "tokenizer.json").exists():
            self.backend = _Json(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").exists():
            self.backend = _SentencePiece(folder / "tokenizer.model")
        else:
            raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model")
        self.bos_id, self.eos_id = (self._special(name) for name in ("bos_token", "eos_token"))
        self.adds_bos = self.config.get("add_bos_token", self.backend.adds_bos) and self.bos_id is not None
        self.chat_template = self._read_chat_template(folder)

    def _special(self, name):
        """The id of a special token, which the config gives as a string, as {"content": string} or
        not at all."""
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, (str, type(None))):
            raise InputError(f"{self.config_file}: {name} is {token!r}, expected a text or null")
        return self.backend.token_id(token) if token else self.backend.special_id(name)

    def __len__(self):
        return len(self.backend)

    def encode(self, text, start=True):
        """Text -> ids. `start`: the text begins the sequence, so it gets its BOS where this
        tokenizer has one. Raises InputError for half a surrogate pair, which is no text."""
        check_text(text, "the text")
        ids = self.backend.encode(text)
        if start and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids):
        """Ids -> text, special tokens left out."""
        return self.backend.decode(list(ids))

    def _read_chat_template(self, folder):
        if (folder / "chat_template.jinja").exists():
            return read_text(folder / "chat_template.jinja")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named ones
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not isinstance(template, (str, type(None))):
            raise InputError(f"{self.config_file}: chat_template is {template!r}, expected a text")
        return template

    def chat(self, messages):
        """[{"role", "content"}] -> the prompt's text, its special tokens written out: encode it
        with start=False."""
        from jinja2 import TemplateError
        from jinja2.sandbox import (
            ImmutableSandboxedEnvironment,
        )  # templates come with checkpoints: don't trust them

        if not self.chat_template:
            raise InputError("this tokenizer has no chat template: leave out --chat")

        def refuse(message):
            raise TemplateError(message)

        extensions = ["jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = refuse
        try:
            template = environment.from_string(self.chat_template)
            bos, eos = (self.backend.token(i) if i is not None else "" for i in (self.bos_id, self.eos_id))
            return template.render(
                messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise InputError(f"chat template: {error}") from None


class _Json:
    """A Hugging Face tokenizer.json."""

    def __init__(self, file):
        from tokenizers import Tokenizer as Fast

        read_json(file)  # for its error messages
        try:
            self.fast = Fast.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: {error}") from None
        self.fast.no_padding()
        self.fast.no_truncation()
        started, bare = (self.fast.encode("a", add_special_tokens=special).ids for special in (True, False))
        self.first = started[0] if started[:1] != bare[:1] else None  # the post-processor's
        self.adds_bos = self.first is not None

    def __len__(self):
        return self.fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text):
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.fast.decode(ids, skip_special_tokens=True)

    def token(self, index):
        return self.fast.id_to_token(index)

    def token_id(self, token):
        return self.fast.token_to_id(token)

    def special_id(self, name):
        """Without a tokenizer_config.json the post-processor still knows BOS; Llama's usual names
        are tried last."""
        if name == "bos_token" and self.first is not None:
            return self.first
        usual = {
            "bos_token": ("<s>", "<|begin_of_text|>"),
            "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
        }
        return next((i for i in map(self.fast.token_to_id, usual[name]) if i is not None), None)


class _SentencePiece:
    """A sentencepiece tokenizer.model, as Llama 1 and 2 and tiny/ have it."""

    adds_bos = True  # LlamaTokenizer's default

    def __init__(self, file):
        from sentencepiece import SentencePieceProcessor

        data = read_known(file)
        words = data[:200].split(b"\n")[0].split(b" ")
        if len(words) == 2 and words[1].isdigit():  # lines of "base64 rank"
            raise InputError(
                f"{file}: is a tiktoken file (Llama 3's own), not sentencepiece; use the tokenizer.json that the "
                "Hugging Face version of the model has"
            )
        try:
            self.pieces = SentencePieceProcessor(model_proto=data)
        except Exception as error:  # the library raises RuntimeError and TypeError
            raise InputError(f"{file}: not a sentencepiece model ({error})") from None
        if not data:
            raise InputError(f"{file}: empty")
        controls = [self.pieces.id_to_piece(i) for i in range(len(self)) if self.pieces.is_control(i)]
        self.controls = re.compile(
            f"({'|'.join(map(re.escape, controls)) or '(?!)'})"
        )  # (?!) matches nothing

    def __len__(self):
        return self.pieces.vocab_size()

    def encode(self, text):
        """Special tokens written out, as chat templates do, become their ids: sentencepiece would
        spell them."""
        ids = []
        for part in filter(None, self.controls.split(text)):
            ids += (
                [self.pieces.piece_to_id(part)] if self.controls.fullmatch(part) else self.pieces.encode(part)
            )
        return ids

    def decode(self, ids):
        return self.pieces.decode([i for i in ids if i < len(self)])

    def token(self, index):
        return self.pieces.id_to_piece(index)

    def token_id(self, token):
        index = self.pieces.piece_to_id(token)
        return None if index == self.pieces.unk_id() and token != self.pieces.id_to_piece(index) else index

    def special_id(self, name):
        index = self.pieces.bos_id() if name == "bos_token" else self.pieces.eos_id()
        return index if index >= 0 else None


class TextStream:
    """Ids in, text out, one at a time: push(id) returns what became whole, flush() the rest;
    together decode(ids).

    A character may span several tokens (byte pieces, emoji), and a decoder may drop the space
    before the first word of what it is given. So each new token is decoded together with the last
    ones that gave text, and only the difference goes out, once it no longer ends in a broken
    character.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = []
        self.start = 0
        self.read = 0

    def push(self, index, last=False):
        """One more token id -> the text that is now whole."""
        if index is not None:
            self.ids.append(index)
        known = self.tokenizer.decode(self.ids[self.start : self.read])
        text = self.tokenizer.decode(self.ids[self.start :])
        if not last and (text.endswith("\ufffd") or len(text) <= len(known)):
            return ""
        if text[len(known) :].strip("\ufffd"):  # keep one chunk of whole text as context for the next
            self.start = self.read
        self.read = len(self.ids)
        return text[len(known) :]

    def flush(self):
        """What is left, at the end."""
        return self.push(None, last=True)
