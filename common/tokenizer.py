"""One interface to `tokenizer.json` (tokenizers) and `tokenizer.model` (sentencepiece).

The two libraries do the work; this file does what they leave open. It puts a BOS in front once (a
second one would shift every position), finds the id that ends a text, knows the tokens that a
fine-tune added, runs chat templates in a sandbox, and streams text in whole characters.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from common.added_tokens import AddedToken, AddedTokens, read_added_tokens
from common.fields import read_field
from common.files import InputError, check_text, read_json, read_known, read_text
from common.printable import shown
from common.tokenizer_json import open_tokenizer_json


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Raises InputError where an id is beyond the model's embedding."""
    if max(ids) >= vocab_size:
        found = f"token id {max(ids)}, but the model has {vocab_size}"
        raise InputError(f"{found}: wrong tokenizer for this model")


class Tokenizer:
    """encode, decode, chat. `bos_id` and `eos_id` may be None; `adds_bos`: texts begin with BOS."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such model folder")
        self.config_file = folder / "tokenizer_config.json"
        self.config = read_json(self.config_file) if self.config_file.exists() else {}
        added = read_added_tokens(folder, self.config)
        if (folder / "tokenizer.json").exists():
            self.backend = open_tokenizer_json(folder, added)
        elif (folder / "tokenizer.model").exists():
            # Folders without the field legacy are older than it: their models were trained that way.
            legacy = self._flag("legacy") is not False
            self.backend = _SentencePiece(folder / "tokenizer.model", added, legacy)
        else:
            raise InputError(f"{folder}: no tokenizer.json and no tokenizer.model")
        self.special_tokens = self.backend.usual_tokens() | added.names  # {"eos_token": "</s>"}
        self.bos_id = self._special("bos_token")
        self.eos_id = self._special("eos_token")
        adds_bos = self._flag("add_bos_token")
        adds_bos = self.backend.adds_bos if adds_bos is None else adds_bos
        self.adds_bos = adds_bos and self.bos_id is not None
        self.chat_templates = self._read_chat_templates(folder)

    def _flag(self, name):
        """True, false or, where the config says nothing, None."""
        return read_field(self.config_file, self.config, name, bool, None)

    def _special(self, name):
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_id(token)

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

    def _read_chat_templates(self, folder):
        """{name: template}; the usual one is "default", some folders have a "tool_use". An empty
        template is none."""
        files = {file.stem: file for file in (folder / "additional_chat_templates").glob("*.jinja")}
        if (folder / "chat_template.jinja").exists():
            files["default"] = folder / "chat_template.jinja"
        if files:
            texts = {name: read_text(file) for name, file in files.items()}
            return {name: text for name, text in texts.items() if text}
        found = self.config.get("chat_template")
        if found is None:
            return {}
        entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
        templates = {}
        for entry in entries:
            fields = entry if isinstance(entry, dict) else {}
            if not isinstance(fields.get("name"), str) or not isinstance(fields.get("template"), str):
                raise InputError(f"{self.config_file}: chat_template is {shown(found)}, expected a text")
            check_text(fields["template"], f"{self.config_file}: chat_template")
            if fields["template"]:
                templates[fields["name"]] = fields["template"]
        return templates

    def chat(self, messages: list[dict[str, Any]], tools: list[dict] | None = None,
             documents: list[dict] | None = None, add_generation_prompt: bool = True,
             continue_final_message: bool = False) -> str:  # fmt: skip
        """[{"role", "content"}] -> the prompt's text with its special tokens written out.

        So it is to be encoded with start=False. The options are those of transformers'
        apply_chat_template; `continue_final_message` takes the place of the generation prompt.
        Raises InputError where there is no template or it fails.
        """
        from common.chat import render

        template = self.chat_templates.get("default")
        if tools is not None:
            template = self.chat_templates.get("tool_use", template)
        if not template:
            raise InputError("this tokenizer has no chat template: leave out --chat")
        values = self.special_tokens | {"tools": tools, "documents": documents}
        values["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        return render(template, messages, continue_final_message, **values)


# A sentencepiece model is a protobuf message, and fields appended to one replace the earlier ones:
# normalizer_spec (field 3) gets add_dummy_prefix (3) and remove_extra_whitespaces (4) of false.
KEEP_SPACES = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])


class _SentencePiece:
    """A sentencepiece tokenizer.model, as Llama 1 and 2 and tiny/ have it."""

    adds_bos = True  # LlamaTokenizer's default

    def __init__(self, file, added: AddedTokens, legacy: bool):
        from sentencepiece import SentencePieceProcessor

        data = read_known(file)
        if not data:
            raise InputError(f"{file}: empty")
        words = data[:200].split(b"\n")[0].split(b" ")
        if len(words) == 2 and words[1].isdigit():  # lines of "base64 rank"
            found = "a tiktoken file (Llama 3's own), not sentencepiece"
            use = "the tokenizer.json that the Hugging Face version of the model has"
            raise InputError(f"{file}: is {found}; use {use}")
        try:
            self.pieces = SentencePieceProcessor(model_proto=data)
            for index in range(self.pieces.vocab_size()):
                self.pieces.id_to_piece(index)  # all must be UTF-8, and so must
            self.pieces.decode([self.pieces.unk_id()])  # what it writes for an unknown character
        except Exception as error:  # the library raises RuntimeError, TypeError, UnicodeDecodeError
            raise InputError(f"{file}: not a sentencepiece model ({error})") from None
        self.legacy = legacy
        self.ids = {}  # text -> id of the tokens that are cut out of a text before it is split
        self._add(added)

    def _add(self, added):
        """Collects the model's own special tokens, the added ones, and special ones that have no id
        yet: theirs follow all others."""
        size = self.pieces.vocab_size()
        tokens = {}
        for index in {*filter(self.pieces.is_control, range(size)), self.pieces.unk_id()}:
            piece = self.pieces.id_to_piece(index)
            self.ids[piece] = index
            tokens[piece] = AddedToken(piece, special=True)
        for index, token in added.placed.items():
            self.ids[token.content] = index
            tokens[token.content] = token
        for token in added.special:
            index = self.token_id(token.content)
            self.ids[token.content] = len(self) if index is None else index
            tokens[token.content] = token
        self.shown = {self.ids[text]: text for text, token in tokens.items() if not token.special}
        self.special = {*self.ids.values()} - self.shown.keys()
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        pattern = "|".join(_pattern(tokens[text]) for text in longest_first)
        self.around = re.compile(f"({pattern})")

    @cached_property
    def inside(self):
        """The same model for the inside of a text: no space is put in front or taken away."""
        return type(self.pieces)(model_proto=self.pieces.serialized_model_proto() + KEEP_SPACES)

    def __len__(self):
        return max([self.pieces.vocab_size() - 1, *self.ids.values()]) + 1

    def encode(self, text):
        """Text -> ids. Special and added tokens become their ids: sentencepiece alone would split
        them like any text.

        sentencepiece puts a space in front of what it gets ("what" becomes "▁what"). A Llama was
        trained with it after each special token (`legacy`) or at the start of the text alone.
        """
        parts = self.around.split(text)  # text, token, text, ..., token, text
        # White space isn't part of the pattern: a long run would be tried from each of its characters.
        for place in range(1, len(parts), 2):
            token = self.tokens[parts[place]]
            if token.lstrip:
                parts[place - 1] = parts[place - 1].rstrip()
            if token.rstrip:
                parts[place + 1] = parts[place + 1].lstrip()
        ids = []
        for place, part in enumerate(parts):
            if place % 2:  # a token
                ids.append(self.ids[part])
            elif part:
                pieces = self.pieces if self.legacy or place == 0 else self.inside
                ids += pieces.encode(part)
        return ids

    def decode(self, ids):
        """Ids -> text without special tokens. Its first word loses sentencepiece's space."""
        size = self.pieces.vocab_size()
        kept = [i for i in ids if i in self.shown or (i < size and i not in self.special)]
        text = ""
        for added, run in groupby(kept, self.shown.__contains__):
            if added:
                text += "".join(map(self.shown.get, run))
            else:
                pieces = self.inside if text else self.pieces
                text += pieces.decode(list(run))
        return text

    def token_id(self, token):
        return self.ids[token] if token in self.ids else self._piece_id(token)

    def _piece_id(self, text):
        index = self.pieces.piece_to_id(text)
        unknown = index == self.pieces.unk_id() and text != self.pieces.id_to_piece(index)
        return None if unknown else index

    def usual_tokens(self):
        """{name: text} of the model's own special tokens, where the folder names no others."""
        pieces = self.pieces
        ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
        ids["unk_token"] = pieces.unk_id()
        return {name: pieces.id_to_piece(index) for name, index in ids.items() if index >= 0}


def _pattern(token):
    """The regular expression that finds an added token."""
    pattern = re.escape(token.content)
    return rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern


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
