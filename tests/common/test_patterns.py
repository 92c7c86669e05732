"""Patterns of adapters match as PEFT's do, and those that would take forever end in one line."""

import re
from types import SimpleNamespace

import pytest

from common import patterns
from common.files import InputError
from common.patterns import PLAIN, match_patterns

PARTS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]
PATHS = [f"model.layers.{layer}.{part}" for layer in (0, 1, 2, 10, 11) for part in PARTS]
UNSLOTH = (  # what unsloth writes for "all of the language model's attention and MLP"
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r"\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
PATTERNS = [
    "q_proj", "proj", "up_proj|q_proj", "layers.1.self_attn.q_proj", r"layers\.1\.mlp\.up_proj", "", "model",
    r"layers\.(0|2)\..*", r".*layers\.[01]\..*(q|up|down)_proj", r"(?!.*10).*v_proj", r"[^.]*", r".*\.\d\..*",
    r"(?:layers\.\d+\.)?mlp.*", r"(?P<part>self_attn|mlp)\.(?:q|up)_proj", r"(\w+)\.q_proj", "layers",
    r"^model.*q_proj$", r"a)|(mlp\.up_proj", r"(?i:Q_PROJ)", "h|layers", r"\w+", "{}", "Q_PROJ", UNSLOTH,
]  # fmt: skip


def compiles(pattern):
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_are_pefts(pattern):
    """Another Linear than PEFT's would get the rank, the alpha or the adapter."""
    from helpers_oracles import peft

    check = peft.tuners.tuners_utils.check_target_module_exists
    if compiles(pattern):
        [found] = match_patterns([pattern], "target", PATHS, "f: x")
        config = SimpleNamespace(target_modules=pattern)
        assert [x is not None for x in found] == [bool(check(config, path)) for path in PATHS]
    [found] = match_patterns([pattern], "key", PATHS, "f: x")
    want = [peft.utils.other.get_pattern_key([pattern], path) == pattern for path in PATHS]
    assert [x is not None for x in found] == want


def test_all_in_one_call(monkeypatch):
    """A call for each of thousands of Linears and keys would take seconds."""
    calls = []
    once = lambda *arguments: calls.append(arguments) or patterns._match(*arguments[1:])  # noqa: E731
    monkeypatch.setattr(patterns, "call_limited", once)
    assert len(match_patterns(PATTERNS, "key", PATHS, "f: x")) == len(PATTERNS)
    assert len(calls) == 1


def test_plain_patterns_need_no_process(monkeypatch):
    """Each adapter that names its Linears would start one."""
    monkeypatch.setattr(patterns, "call_limited", None)
    plain = ["q_proj", "layers.1.self_attn.q_proj", r"layers\.1\.mlp", "h|layers", "[^.]*", "a-b"]
    assert len(match_patterns(plain, "key", PATHS, "f: x")) == len(plain)
    for pattern in [
        "a*",
        "(a)",
        "[ab]",
        "a+",
        "a?",
        "a{2}",
        r"\d",
        r"\1",
        "(?i)a",
        "^a",
        "ä",
        "[^.]*a",
        "\\",
    ]:
        assert not PLAIN.fullmatch(pattern), pattern


def test_a_pattern_without_end_is_one_line():
    """A downloaded adapter stops the program for hours, and Ctrl-C doesn't reach it inside re."""
    with pytest.raises(InputError, match=r"^f: x: matching '\(\.\*\)\*x' takes more than 2 seconds$"):
        match_patterns([r"(.*)*x"], "key", PATHS, "f: x")
    assert match_patterns([r"(q|v)_proj"], "key", PATHS[:1], "f: x") == [PATHS[:1]]


BAD = ["(", "a{99999999999}", "a**", "[a", r"\8", "(?P<a>x)(?P<a>y)", "(?z)", "(" * 5000, "a)"]


@pytest.mark.parametrize("pattern", BAD)
@pytest.mark.parametrize("form", ["target", "key", "layers"])
def test_a_pattern_that_does_not_compile_is_one_line(pattern, form):
    """re raises three kinds of errors, and one of them only for a pattern in PEFT's brackets."""
    with pytest.raises(InputError, match="^f: x: bad pattern ") as caught:
        match_patterns(["q_proj", pattern], form, PATHS, "f: x")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("form", ["key", "layers"])
def test_a_pattern_counts_as_it_is_used(form):
    """(?i) compiles alone but not within PEFT's own pattern: PEFT's error was a traceback here."""
    with pytest.raises(InputError, match="bad pattern '\\(\\?i\\)q_proj': global flags"):
        match_patterns(["(?i)q_proj"], form, PATHS, "f: x")
    assert match_patterns(["(?i).*Q_PROJ"], "target", PATHS[:1], "f: x") == [PATHS[:1]]
