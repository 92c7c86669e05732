"""Hugging Face's tokenizer.json, read by the tokenizers library.

That library panics on some files, loops on others, and can take all memory: an empty pattern, a
decoder that strips more than there is, a damaged character map. So a file runs in this process only
if all its parts are those that Llamas have. Any other runs in the limited process, where the worst
that it can do is to end in one line.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from common.added_tokens import AddedTokens, read_added_tokens
from common.files import InputError, read_json
from common.limited import LimitedError, call_limited

USUAL = {
    "bos_token": ("<s>", "<|begin_of_text|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_token": ("<unk>",),
}

# The parts of Llamas' files: {kind of part: {type: {field: its values}}}.
YES_NO = (True, False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"add_prefix_space": YES_NO, "trim_offsets": YES_NO, "use_regex": YES_NO}
METASPACE = {
    "replacement": ("▁",),
    "prepend_scheme": ("always", "first", "never"),
    "split": YES_NO,
    "add_prefix_space": YES_NO,  # in older files
}
REPLACE = {"pattern": ({"String": " "}, {"String": "▁"}), "content": ("▁", " ")}
PARTS = {
    "normalizer": {"Prepend": {"prepend": ("▁",)}, "Replace": REPLACE},
    "pre_tokenizer": {
        "ByteLevel": BYTE_LEVEL,
        "Digits": {"individual_digits": YES_NO},
        "Metaspace": METASPACE,
        "Split": {"pattern": ({"Regex": LLAMA3},), "behavior": ("Isolated",), "invert": (False,)},
    },
    "decoder": {
        "ByteFallback": {},
        "ByteLevel": BYTE_LEVEL,
        "Fuse": {},
        "Metaspace": METASPACE,
        "Replace": REPLACE,
        "Strip": {"content": (" ",), "start": (0, 1), "stop": (0,)},
    },
    "post_processor": {"ByteLevel": BYTE_LEVEL},
}
ADDED_LENGTH = 100_000  # characters of all added tokens
PROBE = "The fox's 12 mice:\n  für 日本 🎉 "


def open_tokenizer_json(folder: Path, added: AddedTokens) -> "TokenizerJson | LimitedTokenizerJson":
    """The tokenizer of the folder's tokenizer.json. Raises InputError where it is none."""
    file = folder / "tokenizer.json"
    if is_plain(read_json(file), added):
        return TokenizerJson(file, added)
    return LimitedTokenizerJson(file)


# Which files are plain ----------------------------------------------------------------------------


def is_plain(fields: dict[str, Any], added: AddedTokens) -> bool:
    """Whether a tokenizer.json and the folder's added tokens hold nothing but what Llamas' do."""
    listed = fields.get("added_tokens") or []
    tokens = [token._asdict() for token in [*added.placed.values(), *added.special]]
    return (
        all(_are_known_parts(kind, fields.get(kind)) for kind in PARTS)
        and _is_plain_bpe(fields.get("model"))
        and isinstance(listed, list)
        and _are_plain_tokens([*listed, *tokens])
    )


def _are_known_parts(kind, part):
    parts = [] if part is None else [part]
    name = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}.get(kind, f"{kind}s")
    if isinstance(part, dict) and isinstance(part.get(name), list):
        if part != {"type": "Sequence", name: part[name]}:
            return False
        parts = part[name]
    templates = [part for part in parts if kind == "post_processor" and _is_template(part)]
    others = [part for part in parts if part not in templates]
    return len(templates) <= 1 and all(_is_known_part(PARTS[kind], part) for part in others)


def _is_known_part(known, part):
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in known:
        return False
    values = known[kind] | {"type": (kind,)}
    return all(value in values.get(name, ()) for name, value in part.items())


def _is_template(part):
    """Whether a post-processor puts single tokens, such as BOS, around the text."""
    if not isinstance(part, dict) or part.get("type") != "TemplateProcessing":
        return False
    single = part.get("single")
    tokens = part.get("special_tokens")
    if not isinstance(single, list) or not isinstance(tokens, dict):
        return False
    text = {"Sequence": {"id": "A", "type_id": 0}}
    known = [text]
    for name, token in tokens.items():
        ids = token.get("ids") if isinstance(token, dict) else None
        if token == {"id": name, "ids": ids, "tokens": [name]} and isinstance(ids, list) and len(ids) == 1:
            known.append({"SpecialToken": {"id": name, "type_id": 0}})
    return single.count(text) == 1 and all(item in known for item in single)


def _is_plain_bpe(model):
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        return False
    rare = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    unknown = model.get("unk_token")
    known = unknown is None or (isinstance(unknown, str) and unknown in model["vocab"])
    return known and not any(model.get(name) for name in rare)


def _are_plain_tokens(tokens):
    """Whether none takes whitespace along or stands at words' ends only: some of those overlap."""
    length = 0
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or any(
            token.get(name) for name in ("single_word", "lstrip", "rstrip")
        ):
            return False
        length += len(content)
    return length <= ADDED_LENGTH


# The tokenizer ------------------------------------------------------------------------------------


class TokenizerJson:
    """A tokenizer.json in this process."""

    def __init__(self, file, added: AddedTokens):
        from tokenizers import Tokenizer as Fast

        try:
            self.fast = Fast.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: {error}") from None
        self.fast.no_padding()
        self.fast.no_truncation()
        self._add(file, added)
        started = self.fast.encode("a", add_special_tokens=True).ids
        bare = self.fast.encode("a", add_special_tokens=False).ids
        self.first = started[0] if started[:1] != bare[:1] else None  # the post-processor adds it
        self.adds_bos = self.first is not None

    def _add(self, file, added):
        """Adds the tokens that the file lacks. The library numbers them itself, so each must get the
        id that the folder's files give it."""
        from tokenizers import AddedToken as Fast

        placed = sorted(added.placed.items())
        self.fast.add_tokens([Fast(**token._asdict()) for _, token in placed])
        for index, token in placed:
            got = self.fast.token_to_id(token.content)
            if got != index:
                found = f"token {token.content!r} has id {got}"
                raise InputError(f"{file}: {found}, but {index} among the folder's added tokens")
        known = {token.content for token in self.fast.get_added_tokens_decoder().values()}
        new = [token for token in added.special if token.content not in known]
        self.fast.add_tokens([Fast(**token._asdict()) for token in new])

    def __len__(self):
        return self.fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without the special tokens that a post-processor adds."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self.fast.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is none."""
        return self.fast.token_to_id(token)

    def usual_tokens(self) -> dict[str, str]:
        """{name: text} for a folder that names none: the post-processor's BOS, and usual texts."""
        found = {}
        for name, texts in USUAL.items():
            for text in texts:
                if name not in found and self.token_id(text) is not None:
                    found[name] = text
        if self.first is not None:
            found["bos_token"] = self.fast.id_to_token(self.first)
        return found

    def summary(self) -> tuple[int, bool, dict[str, str]]:
        """What LimitedTokenizerJson needs to know."""
        return len(self), self.adds_bos, self.usual_tokens()


class LimitedTokenizerJson:
    """The same in the limited process, whose answers take half a millisecond longer."""

    def __init__(self, file: Path):
        self.file = file.absolute()  # the other process doesn't follow a chdir
        self.size, self.adds_bos, self.usual = self._ask("summary")

    def _ask(self, method, *arguments):
        try:
            return call_limited(_answer, str(self.file), method, arguments, seconds=10)
        except LimitedError as error:
            raise InputError(f"{self.file}: the tokenizers library fails: {error}") from None

    def __len__(self):
        return self.size

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without the special tokens that a post-processor adds."""
        return self._ask("encode", text)

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens left out."""
        return self._ask("decode", ids)

    def token_id(self, token: str) -> int | None:
        """The id of a token's text, None where there is none."""
        return self._ask("token_id", token)

    def usual_tokens(self) -> dict[str, str]:
        """As TokenizerJson's."""
        return self.usual


def _answer(file, method, arguments):
    return getattr(_opened(Path(file)), method)(*arguments)


@lru_cache(maxsize=1)
def _opened(file):
    config = file.with_name("tokenizer_config.json")
    added = read_added_tokens(file.parent, read_json(config) if config.exists() else {})
    opened = TokenizerJson(file, added)
    opened.decode(opened.encode(PROBE))
    return opened
