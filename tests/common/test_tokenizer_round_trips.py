"""Any text, any ids, any conversation: tokenizers and chat templates against transformers'."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.files import InputError
from common.template import TEMPLATE, encode_wrapped, fill
from common.tokenizer import TextStream, Tokenizer
from helpers_hypothesis import few
from helpers_oracles import PreTrainedTokenizerFast
from helpers_templates import TEMPLATES
from helpers_tokenizers import transformers_llama, write_tokenizer

KINDS = ("sentencepiece", "sentencepiece, legacy", "llama2", "llama3", "bytes")
# What the small vocabularies know, what they must spell in bytes, and what looks like a token.
PIECES = ["the", " the", "plural of", " ", "  ", "\n", "\t", "▁", "ß", "日本", "🎉", "👩\u200d👩", "\ufffd"]
PIECES += ["\x00", "\x1b", "\u202e", "\u00a0", "e\u0301", "</s>", "<s>", "<unk>", "<0x41>", "<|end_of_text|>"]
TEXT = st.text(max_size=13) | st.lists(st.sampled_from(PIECES), max_size=7).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """{kind: (our Tokenizer of a folder, transformers')}."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("tokenizer")
        if kind.startswith("sentencepiece"):
            specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            write_tokenizer(folder, "sentencepiece", legacy="legacy" in kind, **specials)
            theirs = transformers_llama(folder)
        else:
            theirs = write_tokenizer(folder, kind) / "tokenizer.json"
            theirs = PreTrainedTokenizerFast(tokenizer_file=str(theirs))
        found[kind] = (Tokenizer(folder), theirs)
    return found


# Ids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@few(80)
@given(text=TEXT)
def test_any_text_has_transformers_ids(tokenizers, kind, text):
    """Without it some character, space or token within a text becomes other ids than those that the
    model was trained with, or comes back as another text."""
    ours, theirs = tokenizers[kind]
    if kind.startswith("sentencepiece"):
        text = text.lstrip(" ▁")  # transformers leaves out sentencepiece's space before one
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, start=False) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@few(80)
@given(data=st.data())
def test_any_ids_have_transformers_text(tokenizers, kind, data):
    """Without it a model that generates half a character, a special token in the middle or an id
    that the tokenizer lacks ends in a traceback or in another text than transformers'."""
    ours, theirs = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, len(ours) - 1), max_size=13))
    text = theirs.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text or not kind.startswith("sentencepiece"):  # broken bytes: each library's own
        assert ours.decode(ids) == text
    unknown = st.integers(len(ours), 2**31)
    more = data.draw(st.lists(st.sampled_from(ids) | unknown if ids else unknown, max_size=7))
    stream = TextStream(ours)
    pushed = [stream.push(index) for index in [*ids, *more]] + [stream.flush()]
    assert isinstance(ours.decode([*ids, *more]), str) and all(isinstance(part, str) for part in pushed)


# Templates ----------------------------------------------------------------------------------------

ROLES = ["system", "user", "assistant"]
TURNS = st.lists(st.tuples(st.sampled_from(ROLES), TEXT), min_size=1, max_size=4)
CHAT = TEXT | st.sampled_from(["{{ bos_token }}", "{% raw %}", "{# x #}", "<|im_end|>", "'\"&<>\\n"])


@st.composite
def chats(draw):
    """Messages as most templates want them, a system message or none and then turns, or in any
    order; the last of them is continued, or is followed by the beginning of an answer, or not."""
    if draw(st.booleans()):
        said = draw(st.lists(CHAT, min_size=1, max_size=3))
        roles = [ROLES[1 + number % 2] for number in range(len(said))]
        if draw(st.booleans()):
            said.insert(0, draw(CHAT))
            roles.insert(0, "system")
    else:
        roles, said = zip(*draw(TURNS), strict=True)
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return messages, {"add_generation_prompt": draw(st.booleans())}


@pytest.fixture(scope="module")
def chat_tokenizers(tmp_path_factory):
    """Our Tokenizer of a folder, which the tests give its template, and transformers'."""
    folder = tmp_path_factory.mktemp("chat")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    write_tokenizer(folder, "llama2", image_token="<image>", **special)
    return Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def rendered(chat, *args, **options):
    """What a chat gives: its text, or InputError where it fails."""
    try:
        return chat(*args, **options)
    except Exception:
        return InputError


@few(150)
@given(template=st.sampled_from(sorted(TEMPLATES)), chat=chats())
def test_any_conversation_has_transformers_text(chat_tokenizers, template, chat):
    """Without it a text that looks like a template, a token or JSON, an empty message or one role
    after another becomes another prompt than transformers' for the same model."""
    ours, theirs = chat_tokenizers
    messages, options = chat
    ours.chat_templates = {"default": TEMPLATES[template]}
    how = {"chat_template": TEMPLATES[template], "tokenize": False} | options
    before = rendered(theirs.apply_chat_template, messages, **how)
    if before is InputError:
        with pytest.raises(InputError, match="chat template"):
            ours.chat(messages, **options)
    else:
        found = ours.chat(messages, **options)
        after = rendered(theirs.apply_chat_template, messages, **how)  # where midnight fell between
        assert found in (before, after)


@few(100)
@given(before=TEXT, between=st.lists(TEXT, max_size=2), after=TEXT, prompt=TEXT | CHAT)
@example(before="{{prompt}", between=[], after="}", prompt="{prompt}{0}{")
def test_any_prompt_in_any_template(tokenizers, before, between, after, prompt):
    """Without it a brace, a backslash or {prompt} itself in a prompt changes what the model sees."""
    parts = [before, *between, after]
    template = "{prompt}".join(parts)
    wrapped = prompt.join(template.split("{prompt}"))
    assert fill(template, prompt) == wrapped
    for ours, _ in tokenizers.values():
        assert encode_wrapped(ours, template, prompt) == ours.encode(wrapped)
        assert encode_wrapped(ours, TEMPLATE, prompt) == ours.encode(f"[INST] {prompt} [/INST]\n")
