"""The special tokens of a tokenizer's folder, and the tokens that a fine-tune added to it.

They stand beside the vocabulary: in tokenizer_config.json (`eos_token` and its like, and
`added_tokens_decoder`), in older folders in special_tokens_map.json and added_tokens.json. Those
two count where the config has no added_tokens_decoder, as in transformers.
"""

from pathlib import Path
from typing import Any, NamedTuple

from common.fields import Number, check, parse_number, read_field
from common.files import InputError, read_json
from common.printable import shown

CONFIG = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_ID = Number(int, 0, 10_000_000)
LISTS = ("additional_special_tokens", "extra_special_tokens")


class AddedToken(NamedTuple):
    """A text that is one token wherever it stands. The tokenizers library has the same fields."""

    content: str
    special: bool  # left out when decoding
    lstrip: bool = False  # takes the whitespace before it along
    rstrip: bool = False  # takes the whitespace after it along
    single_word: bool = False  # only where no letter or digit touches it
    normalized: bool = False


class AddedTokens(NamedTuple):
    """What read_added_tokens found."""

    names: dict[str, str]  # "eos_token" -> "</s>"
    placed: dict[int, AddedToken]  # by the id that a file gives them
    special: list[AddedToken]  # the other special ones: in the vocabulary, or to follow it


def read_added_tokens(folder: Path, config: dict[str, Any]) -> AddedTokens:
    """The tokens that a folder's files name, `config` being its tokenizer_config.json.

    Raises InputError for a file that names them in another form.
    """
    sources = [(folder / CONFIG, config)]
    older = "added_tokens_decoder" not in config
    if older and (folder / "special_tokens_map.json").exists():
        file = folder / "special_tokens_map.json"
        sources.append((file, read_json(file)))
    named = {}
    listed = []
    for file, fields in sources:
        named |= _named_tokens(file, fields)
        listed += _listed_tokens(file, fields)
    special = {token.content: token for token in [*named.values(), *listed]}
    if older and (folder / "added_tokens.json").exists():
        placed = _placed_by_text(folder / "added_tokens.json", special)
    else:
        entries = read_field(folder / CONFIG, config, "added_tokens_decoder", dict, {})
        placed = _placed_by_id(folder / CONFIG, entries, special)
    names = {name: token.content for name, token in named.items()}
    for token in placed.values():
        special.pop(token.content, None)
    return AddedTokens(names, placed, list(special.values()))


def _token(where, value, special):
    """A token as files write it: its text, or an object with the text and its flags."""
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise InputError(f'{where} is {shown(value)}, expected a text or {{"content": text}}')
    flags = {name: read_field(where, fields, name, bool, False) for name in AddedToken._fields[1:]}
    token = AddedToken(check(where, fields["content"], str), **flags)
    return token._replace(special=special or token.special)


def _named_tokens(file, fields):
    """{name: token} of bos_token and its like, and of a model's own, such as image_token."""
    own = fields.get("extra_special_tokens")
    found = {}
    for name, value in (fields | (own if isinstance(own, dict) else {})).items():
        a_name = name in NAMES or (name.endswith("_token") and isinstance(value, str))
        if a_name and value not in (None, ""):
            found[name] = _token(f"{file}: {name}", value, special=True)
    return found


def _listed_tokens(file, fields):
    """The special tokens that have no name of their own."""
    found = []
    for name in LISTS:
        values = fields.get(name) or []
        if not isinstance(values, (list, dict)):
            raise InputError(f"{file}: {name} is {shown(values)}, expected a list")
        values = values.values() if isinstance(values, dict) else values
        found += [_token(f"{file}: {name}", value, special=True) for value in values]
    return found


def _placed_by_text(file, special):
    """{id: token} of added_tokens.json, {text: id}: special are those that are named so elsewhere."""
    placed = {}
    for text, index in read_json(file).items():
        ordinary = AddedToken(check(f"{file}: {shown(text)}", text, str), special=False, normalized=True)
        placed[check(f"{file}: token id of {shown(text)}", index, TOKEN_ID)] = special.get(text, ordinary)
    return placed


def _placed_by_id(file, entries, special):
    """{id: token} of added_tokens_decoder, {"32000": {"content": text, "special": true, ...}}."""
    placed = {}
    for index, entry in entries.items():
        number = parse_number(f"{file}: added_tokens_decoder: token id", index, TOKEN_ID)
        token = _token(f"{file}: added_tokens_decoder: {index}", entry, special=False)
        placed[number] = token._replace(special=token.special or token.content in special)
    return placed
