"""Templates: which one is in use and who says so, and that each gives the ids that it should."""

import json

import pytest

from common.files import InputError
from common.template import (
    CHAT,
    RAW,
    TEMPLATE,
    TemplateOptions,
    asked_template,
    check_template,
    choose_template,
    encode_wrapped,
    fill,
)
from common.tokenizer import Tokenizer
from helpers_models import tokenizer_bytes
from helpers_tokenizers import transformers_llama

MINE = "Q: {prompt}\nA:"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}<assistant> "


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{has a chat template: Tokenizer}; both begin texts with BOS."""
    found = {}
    for has_chat in (False, True):
        folder = tmp_path_factory.mktemp("tokenizer")
        (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        config = {"legacy": False}
        config |= {"chat_template": CHAT_TEMPLATE} if has_chat else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found[has_chat] = Tokenizer(folder)
    return found


@pytest.mark.parametrize(
    ("asked", "stored", "has_chat", "default", "template", "word"),
    [
        (MINE, TEMPLATE, True, "", MINE, "as asked"),
        (RAW, CHAT, True, "", RAW, "as asked"),
        ("", TEMPLATE, True, "", TEMPLATE, "pool.json"),
        ("", CHAT, True, "", CHAT, "pool.json"),
        ("", MINE, True, TEMPLATE, MINE, "pool.json"),
        ("", None, True, TEMPLATE, TEMPLATE, "--template"),
        ("", None, True, "", CHAT, "--raw"),
        ("", None, False, "", RAW, "--template"),
    ],
)
def test_who_says_how_prompts_are_wrapped(tokenizers, asked, stored, has_chat, default, template, word):
    """An adapter under another template than its own answers noise, and nothing else shows it: what
    is used has to follow the user, then the pool, and say so where it is a guess."""
    found, why = choose_template(asked, stored, tokenizers[has_chat], default)
    assert found == template and word in why


@pytest.mark.parametrize(("asked", "stored", "where"), [(CHAT, None, "--chat"), ("", CHAT, "pool.json")])
def test_a_chat_without_a_chat_template(tokenizers, asked, stored, where):
    """It would fail at the first prompt, after minutes of loading."""
    with pytest.raises(InputError, match=f"{where}.*no chat template"):
        choose_template(asked, stored, tokenizers[False])


def test_options_exclude_each_other():
    """Of two templates one would be ignored."""
    assert asked_template(TemplateOptions()) == ""
    assert asked_template(TemplateOptions(template=MINE)) == MINE
    assert asked_template(TemplateOptions(chat=True)) == CHAT
    assert asked_template(TemplateOptions(raw=True)) == RAW
    with pytest.raises(InputError, match="--chat and --raw exclude each other"):
        asked_template(TemplateOptions(chat=True, raw=True))
    with pytest.raises(InputError, match="--template.*no place.*expected a text that holds {prompt}"):
        asked_template(TemplateOptions(template="no place"))


@pytest.mark.parametrize("template", ["", "no place for it", 3, None, "{prompt} \ud800"])
def test_what_is_no_template(template):
    """Without {prompt} every prompt gets the same answer."""
    with pytest.raises(InputError, match="pool.json"):
        check_template(template, "pool.json")


def test_ids_are_those_of_transformers(tokenizers):
    """A second BOS, or one more than the chat template has, shifts every position."""
    tokenizer = tokenizers[True]
    theirs = transformers_llama(tokenizer.config_file.parent)
    said = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    chat = [*said, {"role": "user", "content": "over {it}"}]
    text = theirs.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(encode_wrapped(tokenizer, CHAT, "over {it}", said)).strip() == text.strip()
    ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert encode_wrapped(tokenizer, CHAT, "over {it}", said) == ids
    for template, text in ((MINE, "Q: over {it}\nA:"), (RAW, "over {it}")):
        ids = theirs.encode(text, add_special_tokens=False)
        assert encode_wrapped(tokenizer, template, "over {it}") == [tokenizer.bos_id, *ids]


def test_composites_need_a_text():
    """A chat template within a longer text would end the prompt after its first question."""
    with pytest.raises(InputError, match="--template TEXT"):
        fill(CHAT, "the fox")
