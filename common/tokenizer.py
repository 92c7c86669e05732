"""One interface to `tokenizer.json` (tokenizers) and `tokenizer.model` (sentencepiece).

The two libraries do the work; this file does what they leave open. It puts a BOS in front once (a
second one would shift every position), finds the id that ends a text, runs chat templates in a
sandbox, and streams text in whole characters.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from common.files import InputError, check_text, read_json, read_known, read_text


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Raises InputError where an id is beyond the model's embedding."""
    if max(ids) >= vocab_size:
        found = f"token id {max(ids)}, but the model has {vocab_size}"
        raise InputError(f"{found}: wrong tokenizer for this model")


class Tokenizer:
    """encode, decode, chat. `bos_id` and `eos_id` may be None; `adds_bos`: texts begin with BOS."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.config_file = folder / "tokenizer_config.json"
        self.config = read_json(self.config_file) if self.config_file.exists() else {}
        if (folder / "tokenizer.json").exists():
            self.backend = _Json(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").exists():
            self.backend = _SentencePiece(folder / "tokenizer.model")
        else:
            raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model")
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")
        adds_bos = self.config.get("add_bos_token", self.backend.adds_bos)
        self.adds_bos = adds_bos and self.bos_id is not None
        self.chat_template = self._read_chat_template(folder)

    def _special(self, name):
        """The id of a special token; the config may have it as a text or as {"content": text}."""
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, (str, type(None))):
            raise InputError(f"{self.config_file}: {name} is {token!r}, expected a text or null")
        return self.backend.token_id(token) if token else self.backend.special_id(name)

    def __len__(self) -> int:
        return len(self.backend)

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Text -> ids. At the `start` of a sequence it gets a BOS, if this tokenizer has one.

        Raises InputError for half a surrogate pair, which is no text.
        """
        check_text(text, "the text")
        ids = self.backend.encode(text)
        if start and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.backend.decode(list(ids))

    def _read_chat_template(self, folder):
        if (folder / "chat_template.jinja").exists():
            return read_text(folder / "chat_template.jinja")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # of several named templates the default one
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if not isinstance(template, (str, type(None))):
            raise InputError(f"{self.config_file}: chat_template is {template!r}, expected a text")
        return template

    def chat(self, messages: list[dict[str, str]]) -> str:
        """[{"role", "content"}] -> the prompt's text with its special tokens written out.

        So it is to be encoded with start=False.
        """
        if not self.chat_template:
            raise InputError("this tokenizer has no chat template: leave out --chat")
        values = {"messages": messages, "add_generation_prompt": True}
        values["bos_token"] = "" if self.bos_id is None else self.backend.token(self.bos_id)
        values["eos_token"] = "" if self.eos_id is None else self.backend.token(self.eos_id)
        sandbox = _chat_sandbox()
        try:
            return sandbox.from_string(self.chat_template).render(values)
        except Exception as error:  # a template is a program: it can raise anything
            raise InputError(f"chat template: {error}") from None


def _chat_sandbox():
    """A Jinja sandbox, because templates come with checkpoints and can't be trusted."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
    sandbox = ImmutableSandboxedEnvironment(**options)
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    return sandbox


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
        started = self.fast.encode("a", add_special_tokens=True).ids
        bare = self.fast.encode("a", add_special_tokens=False).ids
        self.first = started[0] if started[:1] != bare[:1] else None  # the post-processor adds it
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
        """The id of a token that the config lacks: the post-processor's BOS, else a usual name's."""
        if name == "bos_token" and self.first is not None:
            return self.first
        usual = {
            "bos_token": ("<s>", "<|begin_of_text|>"),
            "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
        }
        for token in usual[name]:
            if (index := self.fast.token_to_id(token)) is not None:
                return index
        return None


class _SentencePiece:
    """A sentencepiece tokenizer.model, as Llama 1 and 2 and tiny/ have it."""

    adds_bos = True  # LlamaTokenizer's default

    def __init__(self, file):
        from sentencepiece import SentencePieceProcessor

        data = read_known(file)
        words = data[:200].split(b"\n")[0].split(b" ")
        if len(words) == 2 and words[1].isdigit():  # lines of "base64 rank"
            found = "a tiktoken file (Llama 3's own), not sentencepiece"
            use = "the tokenizer.json that the Hugging Face version of the model has"
            raise InputError(f"{file}: is {found}; use {use}")
        try:
            self.pieces = SentencePieceProcessor(model_proto=data)
        except Exception as error:  # the library raises RuntimeError and TypeError
            raise InputError(f"{file}: not a sentencepiece model ({error})") from None
        if not data:
            raise InputError(f"{file}: empty")
        controls = map(self.pieces.id_to_piece, filter(self.pieces.is_control, range(len(self))))
        pattern = "|".join(map(re.escape, controls)) or "(?!)"  # (?!) matches nothing
        self.controls = re.compile(f"({pattern})")

    def __len__(self):
        return self.pieces.vocab_size()

    def encode(self, text):
        """Text -> ids. Special tokens that a chat template wrote out become their ids.

        sentencepiece alone would split them like any text.
        """
        ids = []
        for part in filter(None, self.controls.split(text)):
            if self.controls.fullmatch(part):
                ids.append(self.pieces.piece_to_id(part))
            else:
                ids += self.pieces.encode(part)
        return ids

    def decode(self, ids):
        return self.pieces.decode([i for i in ids if i < len(self)])

    def token(self, index):
        return self.pieces.id_to_piece(index)

    def token_id(self, token):
        index = self.pieces.piece_to_id(token)
        unknown = index == self.pieces.unk_id() and token != self.pieces.id_to_piece(index)
        return None if unknown else index

    def special_id(self, name):
        index = self.pieces.bos_id() if name == "bos_token" else self.pieces.eos_id()
        return index if index >= 0 else None


class TextStream:
    """Ids in, text out: push(id) returns the text that is now whole, flush() the rest.

    All texts together are decode(ids). A character may span several tokens (byte pieces, emoji),
    and a decoder may drop the space before the first word. So a new token is decoded together with
    the last ones that gave text. Only the difference is returned, and only once it no longer ends
    in a broken character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = []
        self.start = 0
        self.read = 0

    def push(self, index: int | None, last: bool = False) -> str:
        """One more token id -> the text that is now whole."""
        if index is not None:
            self.ids.append(index)
        returned = self.tokenizer.decode(self.ids[self.start : self.read])
        text = self.tokenizer.decode(self.ids[self.start :])
        if not last and (text.endswith("\ufffd") or len(text) <= len(returned)):
            return ""
        if text[len(returned) :].strip("\ufffd"):  # this text is context for the next token
            self.start = self.read
        self.read = len(self.ids)
        return text[len(returned) :]

    def flush(self) -> str:
        """The text that is left at the end."""
        return self.push(None, last=True)
