"""Tokens beside the vocabulary, as fine-tunes add them, and spaces after special tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import InputError
from common.tokenizer import TextStream, Tokenizer
from helpers_tokenizers import transformers_llama, write_tokenizer


def token(content, special=True, **flags):
    """An entry of added_tokens_decoder."""
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, "special": special} | plain | flags


def folder_with(folder, kind="sentencepiece", added=None, special=None, **config):
    """A tokenizer's folder with added_tokens.json and special_tokens_map.json."""
    write_tokenizer(folder, kind, **config)
    for name, value in (("added_tokens", added), ("special_tokens_map", special)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# The sentencepiece model has 331 pieces.
PIECES = {0: token("<unk>"), 1: token("<s>"), 2: token("</s>")}
CHATML = {331: token("<|im_start|>"), 332: token("<|im_end|>")}
TOOLS = {333: token("<tool>", special=False), 334: token("<tool_end>", special=False)}
TOOLS |= {335: token("<tool", special=False)}  # the longest one counts
STRIP = {
    331: token("<left>", lstrip=True),
    332: token("<right>", rstrip=True),
    333: token("<both>", special=False, lstrip=True, rstrip=True),
    334: token("word", special=False, single_word=True),
}
WHITE = {335: token("\n "), 336: token(" gap"), 337: token("  ")}
SOURCES = {
    "added_tokens_decoder": {
        "added_tokens_decoder": PIECES | CHATML | TOOLS,
        "eos_token": "<|im_end|>",
    },
    "an EOS that its entry calls ordinary": {
        "added_tokens_decoder": PIECES | {331: token("<|im_end|>", special=False)},
        "eos_token": "<|im_end|>",
    },
    "added_tokens.json": {
        "added": {"<|im_start|>": 331, "<|im_end|>": 332, "<tool>": 333, "<tool_end>": 334},
        "eos_token": "<|im_end|>",
        "extra_special_tokens": ["<|im_start|>"],
    },
    "both files": {
        "added": {"<|im_start|>": 331, "<|im_end|>": 332, "<tool>": 333},
        "special": {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<s>"},
        "eos_token": "</s>",  # the map counts
    },
    "special_tokens_map.json alone": {
        "special": {
            "eos_token": "<|im_end|>",
            "pad_token": "<pad>",
            "extra_special_tokens": ["<|im_start|>"],
        },
    },
    "special_tokens_map.json beside added_tokens_decoder": {  # doesn't count
        "added_tokens_decoder": PIECES | CHATML,
        "eos_token": "</s>",
        "special": {"eos_token": "<|im_end|>"},
    },
    "whitespace and words": {"added_tokens_decoder": PIECES | STRIP},
    "a named token of the model's own": {"image_token": "<tool>"},
}
TEXTS = [
    "</s>what",
    "<s>[INST] the fox",
    "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n",
    "the<tool>fox<tool_end>, the <tool> fox",
    "what is <left> the <right> plural  <both>  of mouse",
    "words and a word, sword word",
    "the  fox<unk>x",
    "<pad>Straße<pad>",
]


@pytest.mark.parametrize("source", SOURCES)
def test_added_tokens_are_those_of_transformers(tmp_path, source):
    """A fine-tune's <|im_end|> that is spelled in bytes is a prompt the model has never seen, an EOS
    that isn't known never ends an answer, and ids beyond the pieces vanish from it."""
    ours, theirs = both(folder_with(tmp_path / "t", legacy=False, **SOURCES[source]))
    assert len(ours) == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, start=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_legacy_is_true_or_false(tmp_path):
    """The text "false" would count as true, and a space come before each part."""
    with pytest.raises(InputError, match="legacy is 'false'"):
        Tokenizer(folder_with(tmp_path / "t", legacy="false"))


def both(folder):
    return Tokenizer(folder), transformers_llama(folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Both tokenizers of a folder with special, shown and stripping tokens."""
    folder = tmp_path_factory.mktemp("mixed") / "t"
    return both(folder_with(folder, legacy=False, added_tokens_decoder=PIECES | STRIP | WHITE))


ADDED = [entry["content"] for entry in (PIECES | STRIP | WHITE).values()]
WORDS = [*ADDED, "the", "fox", " ", "\n", "日", "_"]


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=9))
def test_any_text_with_added_tokens(mixed, words):
    """Added tokens beside each other, at the ends, inside words and amid white space. (transformers
    leaves out sentencepiece's space where a text begins with one: none does here.)"""
    ours, theirs = mixed
    text = "".join(words).lstrip(" ")
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, start=False) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["{}the", "<left>{}", "{}<left>the", "the<right>{}", "<both>{}<both>"])
@pytest.mark.parametrize("space", [" ", "\n"])
def test_a_long_run_of_white_space(tmp_path, space, text):
    """Without it a token that takes the white space before it along is looked for at each character
    of the run, through the whole rest of it: this text takes minutes."""
    ours, theirs = both(folder_with(tmp_path / "t", legacy=False, added_tokens_decoder=PIECES | STRIP))
    text = "fox" + text.format(space * 300_007)
    assert ours.encode(text, start=False) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("legacy", [True, False])
def test_space_after_a_special_token(tmp_path, legacy):
    """sentencepiece puts a space before each part of a text. A model that was trained without it
    after special tokens reads "▁what" where it knows "what"."""
    ours, theirs = both(folder_with(tmp_path / "t", legacy=legacy))
    for text in ("</s>what", "<s>[INST] the fox", "the fox</s>the", "</s></s>\n"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, start=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    what = ours.backend.pieces.encode("what")  # ▁w hat
    assert (ours.encode("</s>what", start=False) == [2, *what]) == legacy


def test_without_the_field_each_part_has_its_space(tmp_path):
    """Folders of before the field were trained with the space, and sentencepiece's own ids have it
    wherever a text begins."""
    ours = Tokenizer(write_tokenizer(tmp_path / "t", "sentencepiece"))
    assert ours.encode("</s>what", start=False) == [2, *ours.backend.pieces.encode("what")]


@pytest.mark.parametrize("config", [{}, {"eos_token": "<|im_end|>", "pad_token": "<pad>"}])
@pytest.mark.parametrize("kind", ["llama2", "bytes"])
def test_tokens_added_to_a_tokenizer_json(tmp_path, kind, config):
    """Some fine-tunes name new tokens in the config alone: without them the template's text is
    spelled in bytes."""
    from helpers_oracles import PreTrainedTokenizerFast

    size = len(Tokenizer(write_tokenizer(tmp_path / "bare", kind)))
    entries = {size: token("<|im_end|>"), size + 1: token("<tool>", special=False)}
    folder = write_tokenizer(tmp_path / "t", kind, added_tokens_decoder=entries, **config)
    ours = Tokenizer(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(ours) == len(theirs) == size + 2 + ("pad_token" in config)
    assert ours.eos_id == (theirs.eos_token_id if config else {"llama2": 2, "bytes": 0}[kind])
    for text in (*TEXTS, "the fox<|im_end|><tool>the"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, start=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_a_named_token_of_a_tokenizer_json_is_one_id(tmp_path):
    """A vocabulary may hold the EOS as an ordinary entry, which no merge reaches; where a file names
    it, its text is that one id, and no answer shows it."""
    from helpers_oracles import PreTrainedTokenizerFast

    folder = folder_with(tmp_path / "t", "bytes", special={"eos_token": "<end>"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["<end>"] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ours = Tokenizer(folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.eos_id == theirs.eos_token_id == vocab["<end>"]
    ids = theirs.encode("the fox<end> the")
    assert ours.encode("the fox<end> the") == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "the fox the"


def test_special_tokens_without_an_id_follow_the_vocabulary(tmp_path):
    """special_tokens_map.json alone gives no ids: transformers 4 numbered its tokens in their order,
    and those are the rows that were trained."""
    special = {
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>"}, "</s>"],
    }
    ours = Tokenizer(folder_with(tmp_path / "t", special=special))
    assert (ours.eos_id, len(ours)) == (331, 333)
    assert ours.encode("<|im_start|><|im_end|></s>", start=False) == [332, 331, 2]


def test_ids_with_holes_are_kept(tmp_path):
    """A vocabulary is padded before tokens are added to it: the id that the file gives is the row
    that was trained. The tokenizers library can't skip ids, so there another id is refused."""
    entries = {340: token("<|im_end|>"), 350: token("<tool>", special=False)}
    ours = Tokenizer(folder_with(tmp_path / "t", legacy=False, added_tokens_decoder=entries))
    assert ours.encode("the<tool>fox<|im_end|>", start=False)[1::3] == [350, 340]
    assert (ours.decode([350, 345, 340, 350]), len(ours)) == ("<tool><tool>", 351)
    folder = folder_with(tmp_path / "u", "llama2", added_tokens_decoder=entries)
    with pytest.raises(InputError, match=r"tokenizer\.json.*im_end.*340"):
        Tokenizer(folder)


def test_added_tokens_stream(tmp_path):
    """A stream decodes a few tokens at a time: an added token in front must neither swallow the
    space of the next word nor give it twice."""
    entries = {331: token("<tool>", special=False), 332: token("<|im_end|>")}
    ours = Tokenizer(folder_with(tmp_path / "t", added_tokens_decoder=entries, legacy=False))
    for text in ("<tool> the fox", "the<tool> fox", "the fox <tool><tool>what<|im_end|> the 日本"):
        ids = ours.encode(text, start=False)
        texts = TextStream(ours)
        parts = [texts.push(index) for index in ids] + [texts.flush()]
        assert "".join(parts) == ours.decode(ids) == text.replace("<|im_end|>", "")


BAD = {
    "a list": ({"added_tokens_decoder": []}, ["added_tokens_decoder", "[]", "object"]),
    "no id": ({"added_tokens_decoder": {"x": token("<a>")}}, ["'x'", "token id"]),
    "a long id": ({"added_tokens_decoder": {"1" * 5000: token("<a>")}}, ["token id"]),
    "no text": ({"added_tokens_decoder": {"9": {"special": True}}}, ["9", "special", "content"]),
    "empty": ({"added_tokens_decoder": {"9": token("")}}, ["9", "content"]),
    "a flag": ({"added_tokens_decoder": {"9": token("<a>", lstrip=1)}}, ["lstrip", "1", "true"]),
    "listed": ({"additional_special_tokens": [7]}, ["additional_special_tokens", "7"]),
    "no list": ({"additional_special_tokens": "<a>"}, ["additional_special_tokens", "list"]),
    "added": ({"added": {"<a>": "331"}}, ["added_tokens.json", "<a>", "'331'", "token id"]),
    "below 0": ({"added": {"<a>": -1}}, ["added_tokens.json", "<a>", "-1"]),
    "map": ({"special": {"eos_token": 2}}, ["special_tokens_map.json", "eos_token", "2"]),
}


@pytest.mark.parametrize("kind", ["sentencepiece", "llama2"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_entries_are_refused(tmp_path, kind, bad):
    """A token that is read as another one, or a traceback from inside a library."""
    fields, words = BAD[bad]
    with pytest.raises(InputError) as caught:
        Tokenizer(folder_with(tmp_path / "t", kind, **fields))
    assert all(word in str(caught.value) for word in words), caught.value
