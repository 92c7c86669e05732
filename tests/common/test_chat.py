"""Chat templates see what transformers shows them, and render to the same text."""

from datetime import date

import pytest

from common.chat import render
from common.files import InputError
from common.tokenizer import Tokenizer
from helpers_templates import BLOCKS, TEMPLATES
from helpers_tokenizers import write_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
SYSTEM = {"role": "system", "content": "be <brief> & 'kind'"}
TURNS = [
    {"role": "user", "content": "  {{ what }}  ß🎉"},
    {"role": "assistant", "content": "mice "},
    {"role": "user", "content": "and fox?"},
]
CALL = {"name": "plural", "arguments": {"word": "fox", "count": 2}}
CALLS = [
    TURNS[0],
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "name": "plural", "content": '{"plural": "foxes"}'},
    {"role": "user", "content": "thanks"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "plural",
            "description": "The plural of a <word>: Füchse & 'mice'",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "Mice", "text": "A mouse, two mice."}]
CHATS = {
    "one": ([TURNS[0]], {}),
    "turns": (TURNS, {}),
    "system": ([SYSTEM, *TURNS], {}),
    "tools": (CALLS, {"tools": TOOLS}),
    "documents": (TURNS, {"documents": DOCUMENTS}),
    "no tools": (TURNS, {"tools": []}),
    "no generation prompt": (TURNS, {"add_generation_prompt": False}),
    "continued": (TURNS[:2], {"continue_final_message": True}),
    "continued, no space": ([TURNS[0], TURNS[2]], {"continue_final_message": True}),
}


def both(folder, template):
    """Our tokenizer of a folder with this template, and transformers'."""
    from helpers_oracles import PreTrainedTokenizerFast

    config = {"chat_template": template, "image_token": "<image>"} | SPECIAL
    write_tokenizer(folder, "llama2", **config, additional_special_tokens=["<extra>"])
    return Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(chat):
    """What a chat gives: its text, or that it fails."""
    try:
        return chat()
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_equals_transformers(tmp_path, template):
    """A chat model that gets one line break too many, no date, no tools, or no BOS answers worse,
    and nothing says so."""
    ours, theirs = both(tmp_path / "t", TEMPLATES[template])
    texts = {}
    for name, (messages, options) in CHATS.items():
        prompted = "continue_final_message" not in options
        full = {"add_generation_prompt": prompted} | options
        before = rendered(lambda: ours.chat(messages, **options))
        want = rendered(lambda: theirs.apply_chat_template(messages, tokenize=False, **full))
        after = rendered(lambda: ours.chat(messages, **options))  # where midnight fell between
        if isinstance(want, str):
            assert want in (before, after), name
            texts[name] = want
        else:
            assert before is InputError, (name, want)
    assert len(texts) >= 4, texts


def test_content_blocks_are_continued(tmp_path):
    """Messages of several blocks end with the last block's text."""
    ours, theirs = both(tmp_path / "t", BLOCKS)
    blocks = [{"type": "text", "text": "the fox "}, {"type": "text", "text": "jumps"}]
    messages = [TURNS[0], {"role": "assistant", "content": blocks}]
    want = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.chat(messages, continue_final_message=True) == want
    assert want.endswith("jumps") and messages[1]["content"] == blocks


@pytest.mark.parametrize("kind", ["sentencepiece", "llama2"])
def test_chat_text_becomes_special_tokens(tmp_path, kind):
    """A template writes its special tokens out as text: each must become its one id again, BOS
    once. As "<", "s", ">" the model has never seen them."""
    template = "{{ bos_token }}the {{ eos_token }}fox"
    ours = Tokenizer(write_tokenizer(tmp_path / "t", kind, chat_template=template))
    ids = ours.encode(ours.chat(TURNS), start=False)
    assert ids[0] == ours.bos_id and ids.count(ours.bos_id) == 1
    assert ids.count(ours.eos_id) == 1


def test_chat_template_is_found_in_every_place(tmp_path):
    """Newer folders keep it in a file of its own, some name several: a template that isn't found is
    no chat at all, and that for tools is another one."""
    from helpers_oracles import PreTrainedTokenizerFast

    def shown(options):
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
        text = Tokenizer(folder).chat(TURNS, **options)
        assert text == theirs.apply_chat_template(TURNS, tokenize=False, **options)
        return text

    listed = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    folder = write_tokenizer(tmp_path / "t", "llama2", chat_template=listed)
    assert (shown({}), shown({"tools": TOOLS})) == ("plain", "tools")
    (folder / "chat_template.jinja").write_text("from the file")
    assert (shown({}), shown({"tools": TOOLS})) == ("from the file", "from the file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("its tools")
    assert (shown({}), shown({"tools": TOOLS})) == ("from the file", "its tools")
    for kind in ("llama2", "sentencepiece"):
        with pytest.raises(InputError, match="no chat template"):
            Tokenizer(write_tokenizer(tmp_path / f"bare {kind}", kind)).chat(TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for m in messages %}",
        "{% generation %}{{ messages }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ sep_token + 'x' }}",
        "{{ 1 / 0 }}",
    ],
)
def test_bad_templates_are_refused(tmp_path, template):
    """Templates come with downloaded checkpoints: they must neither reach Python's insides nor end
    in a traceback."""
    ours = Tokenizer(write_tokenizer(tmp_path / "t", "llama2", chat_template=template))
    with pytest.raises(InputError, match="chat template"):
        ours.chat(TURNS)


@pytest.mark.parametrize("template", ["{{ messages[0].role }}", "{{ messages[-1].content[4:] }}"])
def test_a_message_that_the_template_changes_is_not_continued(tmp_path, template):
    """A model would go on with something else than what the assistant is said to have begun."""
    ours = Tokenizer(write_tokenizer(tmp_path / "t", "llama2", chat_template=template))
    with pytest.raises(InputError, match="final message"):
        ours.chat(TURNS, continue_final_message=True)


HOSTILE = {
    "loops in loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
                       "{% endfor %}{% endfor %}{% endfor %}", "takes more than 2 seconds"),
    "a long text": ("{{ messages[0].content * 10**10 }}", "needs more than 1 GiB of memory"),
    "a longer text": ("{{ 'a' * 10**20 }}", "index-sized"),
    "text of many parts": ("{% for a in range(99999) %}{{ lipsum }}{{ 'a' * 1000 }}{% endfor %}",
                           "gives more than 10,000,000 characters"),
    "a wide number": ("{{ '%10000000000d' % 1 }}", "needs more than 1 GiB of memory"),
    "a wide format": ("{{ '{:>10000000000}'.format(1) }}", "needs more than 1 GiB of memory"),
    "indented": ("{{ messages | tojson(indent=10**10) }}", "needs more than 1 GiB of memory"),
    "grown": ("{% set n = namespace(s='abc') %}{% for i in range(60) %}{% set n.s = n.s * 1000 %}{% endfor %}",
              "needs more than 1 GiB of memory"),
    "a macro in itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a circle": ("{% set n = namespace() %}{% set n.a = n %}{{ n | tojson }}", "JSON"),
    "deep brackets": ("{{ " + "[" * 90_000 + " }}", "recursion"),
    "a long digit": ("{{ 10 ** 5000 }}", "4300 digits"),
    "a long refusal": ("{{ raise_exception('no ' * 10**6) }}", "no no no"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_without_end_is_one_line(tmp_path, kind):
    """A downloaded checkpoint would take all of the machine's time or memory before it answers."""
    template, words = HOSTILE[kind]
    with pytest.raises(InputError, match="^chat template: ") as caught:
        render(template, TURNS)
    assert words in str(caught.value) and len(str(caught.value)) < 1100
    assert render("{{ messages[0].role }}", TURNS) == "user"


def test_values_that_are_no_json_are_refused():
    """A caller's own objects can't be sent to the process that renders: which one it was?"""
    with pytest.raises(InputError, match="chat template: not a JSON value: .* date is not"):
        render("{{ today }}", TURNS, today=date(2026, 1, 2))


@pytest.mark.parametrize("content", [None, [], [{"type": "image"}], ["text"], 5])
def test_a_final_message_without_text_is_not_continued(content):
    """A message of the caller's own making is a traceback."""
    with pytest.raises(InputError, match="final message has no text"):
        render("{{ messages }}", [{"role": "assistant", "content": content}], continue_final=True)


def test_an_empty_template_is_none(tmp_path):
    """The model would be asked nothing at all."""
    folder = write_tokenizer(tmp_path / "t", "llama2", chat_template="")
    assert Tokenizer(folder).chat_templates == {}
    (folder / "chat_template.jinja").write_text("")
    assert Tokenizer(folder).chat_templates == {}


@pytest.mark.parametrize(
    "template", [1, {"a": "b"}, ["x"], [{"name": "default"}], [{"template": "x"}], "\ud800"]
)
def test_a_template_of_another_form_is_refused(tmp_path, template):
    """A hand-edited config is a traceback, or a chat without a template."""
    folder = write_tokenizer(tmp_path / "t", "llama2", chat_template=template)
    with pytest.raises(InputError, match="tokenizer_config.json: chat_template"):
        Tokenizer(folder)
