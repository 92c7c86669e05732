"""The routing explorer as it is written: nothing of the text becomes markup, the bytes hold the
recorded weights, a long page stays small, a mixture isn't passed off as a choice."""

import base64
import json
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate
from common.printable import in_lines
from decoding import respond
from decoding.loop import decode
from decoding.page import how_chosen
from decoding.prompts import encode_prompt
from decoding.sampling import Sampling
from generate import load, stream
from helpers_commands import command
from helpers_models import RANKS
from methods.batch import find_method, set_methods
from moe_lora import Recorder, attached
from pictures.page import Shown, html_page
from pictures.page_weights import LinearWeights, heaviest
from pictures.palette import COLOURS

EVIL = "</script><b>x"
TEXTS = ["</script><script>alert(1)</script>", "{{ 7 * 7 }}{% if %}", "&quot;", " \u2028", "<!--", "'\"`${1}"]
VOID = {"meta"}
ABOUT = {"Method": "meteora", "Model": "tiny", "Pool": EVIL, "Date": "2026-01-02"}


class Page(HTMLParser):
    """Collects a page's tags, attributes, the tokens of each part with their class, and the texts of
    elements by tag."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.tags, self.attributes, self.parts, self.legend = [], [], set(), [], []
        self.texts = {}
        self.feed(page)
        self.data = json.loads(re.search(r'id="data">(.*)</script>\n<script>', page)[1])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.attributes |= attributes.keys()
        self.stack += [] if tag in VOID else [tag]
        if attributes.get("class") == "tokens":
            self.parts.append((attributes["aria-label"], []))
        elif tag == "span" and attributes.get("class") != "method":
            self.parts[-1][1].append(["", attributes.get("class")])
        elif tag == "button":
            self.legend.append(["", attributes["class"]])

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, text):
        tag = self.stack[-1] if self.stack else ""
        self.texts[tag] = self.texts.get(tag, "") + text
        if tag == "span" and self.parts and "article" in self.stack and "div" in self.stack[-3:]:
            self.parts[-1][1][-1][0] += text
        elif "button" in self.stack:
            self.legend[-1][0] += text


def shown(prompt, answer, weights=None, method="meteora", how="A gate chose."):
    """A request of these tokens, [(text, [[adapter, weight], ...])]; weights (m, n, e) of both."""
    weights = torch.zeros(0, len(prompt) + len(answer), 0) if weights is None else weights
    parts = [[{"text": text, "adapters": adapters} for text, adapters in part] for part in (prompt, answer)]
    return Shown({"method": method, "prompt_tokens": parts[0], "tokens": parts[1]}, how, heaviest(weights))


def decoded(data, token):
    """A token's [[(slot, weight), ...] of each Linear], by hand from what the file's comment says."""
    raw, size = base64.b64decode(data["tokens"][token][2]), 3 if len(data["names"]) > 256 else 2
    assert len(raw) == len(data["linears"]) * data["k"] * size
    pairs = [raw[j : j + size] for j in range(0, len(raw), size)]
    pairs = [(int.from_bytes(pair[:-1], "little"), pair[-1] / 255 * data["unit"]) for pair in pairs]
    k = data["k"]
    return [[pair for pair in pairs[j : j + k] if pair[1]] for j in range(0, len(pairs), k)] if k else []


def test_nothing_becomes_markup():
    """Without it a model's answer, a prompt or an adapter's name runs as a script in the reader's
    browser, or the page needs the network."""
    names = [EVIL, "&quot;", "{{ 7 * 7 }}", "\u2028"]
    tokens = [(text, [[name, 0.5]]) for text, name in zip(TEXTS, names * 2, strict=False)]
    page = html_page([shown(tokens, tokens[::-1], method=EVIL, how=EVIL)], names, [], ABOUT)
    parsed = Page(page)
    assert parsed.stack == [] and parsed.tags.count("script") == 2 and "b" in parsed.tags
    assert parsed.tags.count("span") == 2 * len(TEXTS) + 1
    known = {"html", "head", "meta", "title", "style", "body", "header", "h1", "dl", "div", "dt", "dd", "p"}
    known |= {"section", "h2", "button", "i", "small", "b", "main", "article", "h3", "span", "aside"}
    assert set(parsed.tags) == known | {"noscript", "script"}
    texts = list(map(in_lines, TEXTS))
    assert [[text for text, _ in part] for _, part in parsed.parts] == [texts, texts[::-1]]
    assert parsed.texts["dd"] == "meteoratiny" + EVIL + "2026-01-02" and EVIL in parsed.texts["p"]
    assert EVIL in parsed.texts["span"]
    assert {re.sub(r" \d+% .*", "", text.strip()[2:]) for text, _ in parsed.legend} == set(
        map(in_lines, names)
    )
    assert parsed.data["names"] == list(map(in_lines, names)) and "\u2028" not in page
    assert not any(name.startswith("on") or name in ("src", "href") for name in parsed.attributes)
    assert not re.search(r"https?:|url\(|@import|\beval\(|innerHTML", page)


texts = st.text(st.characters(exclude_categories=()), max_size=12)  # halves of surrogate pairs, too
mixtures = st.lists(
    st.tuples(st.sampled_from("abcdefg"), st.integers(1, 999).map(lambda w: w / 1000)), max_size=4,
    unique_by=lambda pair: pair[0],
)  # fmt: skip
traces = st.lists(st.tuples(texts, mixtures), max_size=4)


@given(st.lists(st.tuples(traces, traces), min_size=1, max_size=3))
def test_the_page_holds_the_whole_text(pairs):
    """Without it tokens are lost or swallowed as markup; prompt and answer can't be told apart. A
    NUL or a carriage return would reach the reader as another character, half a surrogate pair would
    end the writing in a traceback, and a mark that reorders text would reorder the page."""
    page = html_page([shown(*pair) for pair in pairs], list("abcdefg"), [], ABOUT)
    assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    parsed = Page(page)
    labels = [f"{part} {number + 1}" for number in range(len(pairs)) for part in ("Prompt", "Answer")]
    assert [label for label, _ in parsed.parts] == labels
    assert [[t for t, _ in part] for _, part in parsed.parts] == [
        [in_lines(t) for t, _ in y] for p in pairs for y in p
    ]
    averages = [[[slot, w / 1000] for slot, w in zip(flat[::2], flat[1::2], strict=True)]
                for _, flat, _ in parsed.data["tokens"]]  # fmt: skip
    want = [[["abcdefg".index(name), w] for name, w in used] for pair in pairs for y in pair for _, used in y]
    assert averages == want


def test_tokens_have_the_legend_s_colours():
    """Without it the legend explains other colours than the text has, or a token of two equal
    adapters is passed off as one's."""
    used = [[], [["plural", 1.0]], [["roman", 0.6], ["plural", 0.4]], [["plural", 0.5], ["roman", 0.5]]]
    names = ["roman", "", "plural", "elm"]  # elm leads no token, but may lead in a Linear
    page = html_page([shown([("p", used[0])], [("a", y) for y in used[1:]])], names, [], ABOUT)
    parsed = Page(page)
    assert [colour for _, part in parsed.parts for _, colour in part] == [None, "a2", "a0", None]
    assert [(" ".join(text.split()[1:]), slot) for text, slot in parsed.legend] == [
        ("plural 63% 1.90", "a2"), ("roman 37% 1.10", "a0")]  # fmt: skip
    colours = dict(re.findall(r"^\.(a\d) \{ --c: rgb\(([\d, ]+)\) }$", page, re.M))
    assert colours.keys() == {"a0", "a2", "a3"} and len(set(colours.values())) == 3
    assert re.findall(r"heaviest at (\d) of (\d) tokens", page) == [("1", "4"), ("1", "4")]
    assert {tuple(map(int, colour.split(","))) for colour in colours.values()} <= set(COLOURS)


def test_what_carries_most_of_the_text_has_colours_of_its_own():
    """Without it adapters that answer look alike, where more were recorded than there are
    colours."""
    names = [f"a{j}" for j in range(2 * len(COLOURS))]
    begin = ("1", [[name, 1 / len(names)] for name in names])
    heavy = [names[j] for j in (0, len(COLOURS), 1, len(COLOURS) + 1)]
    page = html_page([shown([begin], [(name, [[name, 1.0]]) for name in heavy])], names, [], ABOUT)
    colours = dict(re.findall(r"^\.a(\d+) \{ --c: (rgb.*) }$", page, re.M))
    assert len(colours) == len(names)
    assert len({colours[slot] for slot in map(str, map(names.index, heavy))}) == 4


# The bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("e, largest", [(7, 1.0), (3, 2.5), (256, 1.0), (257, 1.0), (601, 1.0)])
def test_bytes_hold_the_four_heaviest(e, largest):
    """Without it a heat map names another adapter, or another weight, than the gate chose; a pool
    too large for one byte an adapter wraps around."""
    m, n = 5, 11
    generator = torch.Generator().manual_seed(e)
    weights = torch.rand(m, n, e, generator=generator) * largest
    weights[2, 3] = 0
    weights[0, 0, e - 1] = largest
    paths = [f"model.layers.{j}.mlp.up_proj" for j in range(m)]
    request = shown([("t", [])] * 4, [("t", [])] * 7, weights)
    data = Page(html_page([request], [f"adapter {j}" for j in range(e)], paths, ABOUT)).data
    assert data["linears"] == [[j, "up"] for j in range(m)] and len(data["tokens"]) == n
    for token in range(n):
        for found, row in zip(decoded(data, token), weights[:, token].tolist(), strict=True):
            want = sorted(enumerate(row), key=lambda pair: -pair[1])[:4]
            want = [pair for pair in want if pair[1] > largest / 510]  # less is a byte of 0
            assert len(found) == len(want)
            for (slot, weight), (_, real) in zip(found, want, strict=True):
                assert weight == pytest.approx(real, abs=largest / 509)
                assert weight == pytest.approx(row[slot], abs=largest / 509)
    ess = [sum(row) ** 2 / sum(w**2 for w in row) for row in weights[:, 3].tolist() if max(row)]
    assert len(ess) == m - 1
    assert data["tokens"][3][0] / 100 == pytest.approx(sum(ess) / (m - 1), abs=0.006)


def test_bytes_of_top_2_gates_are_half():
    """Without it each page carries zeros for adapters that no gate chose."""
    weights = torch.zeros(3, 2, 7)
    weights[..., 6], weights[..., 2] = 0.75, 0.25
    data = Page(
        html_page([shown([("a", [])], [("b", [])], weights)], list("abcdefg"), ["x.0.y"] * 3, ABOUT)
    ).data
    assert data["k"] == 2 and data["tokens"][0][2] == base64.b64encode(bytes([6, 191, 2, 64] * 3)).decode()
    assert data["tokens"][0][0] == 160  # 1 / (0.75^2 + 0.25^2)


@pytest.mark.parametrize("k", [2, 4])
def test_a_long_answer_stays_small(k):
    """Without it 2,000 tokens of SmolLM2 are a page that no mail takes and that opens with a wait."""
    n, m, e = 2000, 210, 28
    generator = torch.Generator().manual_seed(k)
    weights, idx = torch.rand(m, n, e, generator=generator).topk(k)
    weights = torch.zeros(m, n, e).scatter_(-1, idx, (3 * weights).softmax(-1))
    mean = weights.mean(0)
    names = [f"adapter_{j}" for j in range(e)]
    tokens = []
    for row in mean.tolist():
        used = [[name, round(w, 3)] for name, w in zip(names, row, strict=True)]
        tokens.append((" token", sorted(used, key=lambda pair: -pair[1])))
    paths = [f"model.layers.{j // 7}.mlp.{'qkvogud'[j % 7]}_proj" for j in range(m)]
    page = html_page([shown(tokens[:1000], tokens[1000:], weights)], names, paths, ABOUT)
    assert len(page.encode()) < 5_000_000
    assert page.count("<span") == n + 1 and page.count("<td") == 0  # no heat map before a click


# What decoding shows of each Linear ---------------------------------------------------------------


@pytest.fixture(scope="module")
def mole(small_model, pool_with_every_part):
    return load(small_model, pool_with_every_part)


def test_watching_sees_what_is_averaged(mole):
    """Without it the heat map is of another token, or of a padded row's neighbour."""
    ids = [encode_prompt(mole, text) for text in ("the fox", "the quick brown fox jumps over")]
    set_methods(mole, ["meteora_top2", "adapter:bee"])
    watched = LinearWeights()
    events = decode(mole, ids, Sampling(5), True, None, watched)
    prompts = next(events)
    answers = [[], []]
    for token in events:
        answers[token.row].append(token.adapters)
    pool = mole.attached[1]
    for row in range(2):
        found = watched.of_row(row, len(ids[row]), len(answers[row]))
        for j, adapters in enumerate([*prompts[row], *answers[row]]):
            mean = torch.zeros(len(RANKS)).index_add_(
                0, found.slot[j].long().flatten(), found.weight[j].flatten()
            ) / len(found.slot[j])
            want = {name: pytest.approx(float(mean[pool.slot(name)]), abs=1e-3) for name, _ in adapters}
            assert dict(adapters) == want and adapters
    # Another way to the same: the whole text at once, one Linear at a time.
    set_methods(mole, ["meteora_top2"])
    with torch.inference_mode(), Recorder(mole.model, len(ids[0])) as recorder:
        mole.model(torch.tensor([ids[0]]))
    again, slots = recorder.read(len(ids[0])).movedim(0, 1).topk(2, -1)
    found = watched.of_row(0, len(ids[0]), 0)
    assert torch.equal(found.slot[..., :2].long(), slots)
    torch.testing.assert_close(found.weight[..., :2], again, atol=1e-5, rtol=1e-5)


def test_nothing_is_watched_unless_asked(small_model, pool_with_every_part, monkeypatch, capsys):
    """Without it every answer pays for a page that nobody wants."""
    monkeypatch.setattr(respond, "LinearWeights", None)
    ask = ["--model", small_model, "--pool", pool_with_every_part, "--prompt", "the fox", "--json"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, ask), "--max_new_tokens", "2"])
    generate.main()
    assert json.loads(capsys.readouterr().out)["tokens"]


# Words --------------------------------------------------------------------------------------------

FIXED = "One fixed mixture for the whole request"
WORDS = {
    "meteora_top2": "In each Linear a gate weighed the adapters anew for every token.",
    "ramole": "In each Linear a gate", "loraflow": "In each layer a gate",
    "ase": "In each Linear a gate", "meteora_once": "For all Linears together a gate",
    "uniform": FIXED, "mix:ant=0.7,bee=0.5": FIXED, "selection": FIXED,
    "adapter:bee": FIXED, "logo": FIXED, "smear": "One mixture a Linear, made from the whole prompt",
    "fusion": "One adapter, made before the first token", "svd": "One adapter, made before the first token",
    "ties_ba": "merged into a copy of the base's weights", "base": "no adapter took part",
}  # fmt: skip


@pytest.mark.parametrize("method", WORDS)
def test_a_mixture_is_called_one(mole, method):
    """Without it a mixture of the whole request looks as if every token had chosen it."""
    how = how_chosen(find_method(mole, method))
    assert WORDS[method] in how
    assert ("nothing was chosen token by token" in how) == (WORDS[method].startswith("One"))


def test_pages_of_commands(small_model, pool_with_every_part, tmp_path):
    """Without it the page's numbers aren't --json's, or a method that records nothing is an error."""
    page = tmp_path / "page.html"
    ask = ["generate.py", "--model", small_model, "--pool", pool_with_every_part, "--prompt", "the fox"]
    ask += ["--max_new_tokens", 5, "--html", page, "--json", "--method"]
    for method in ("meteora_top2", "smear", "fusion", "ties_ba", "base"):
        done = command(*ask, method)
        assert done.returncode == 0, done.stderr
        line = json.loads(done.stdout)
        parsed = Page(page.read_text("utf-8"))
        data = parsed.data
        for token, (ess, flat, _) in zip(line["prompt_tokens"] + line["tokens"], data["tokens"], strict=True):
            pairs = zip(flat[::2], flat[1::2], strict=True)
            assert [[data["names"][slot], w / 1000] for slot, w in pairs] == token["adapters"]
            assert (ess > 0) == bool(token["adapters"])
        assert parsed.texts["dd"].startswith(f"{method}small") and WORDS[method] in parsed.texts["p"]
        recorded = method not in ("ties_ba", "base")
        assert ("No adapter took part" in parsed.texts["p"]) == (not recorded)
        assert len(data["linears"]) == (0 if method == "ties_ba" else 21)
        weighty = {any(decoded(data, j)) for j in range(len(data["tokens"]))}
        assert weighty == {recorded}


def test_weights_below_zero_are_said_to_be_missing():
    """Without it the page of mix:a=1,b=-0.5 shows adapter a alone and says nothing."""
    weights = torch.tensor([[[1.0, -0.5]]])
    notes = [html_page([shown([("a", [["a", 1.0]])], [], w)], ["a", "b"], ["x.0.y"], ABOUT) for w in
             (weights, weights.abs())]  # fmt: skip
    nothing_above = html_page([shown([("a", [])], [], -weights.abs())], ["a", "b"], ["x.0.y"], ABOUT)
    assert ["below zero" in note for note in (*notes, nothing_above)] == [True, False, True]
    assert "No adapter took part" not in nothing_above
    assert "<b>1.80</b>" in notes[0] and "<b>1.80</b>" in notes[1]  # 1.5^2 / 1.25


def test_the_effective_number_is_of_tokens_that_use_an_adapter():
    """Without it a prompt that the base answers makes the number of the others in its batch smaller."""
    weights = torch.tensor([[[1.0, 0.5]]])
    requests = [shown([("a", [["a", 1.0]])], [], weights), shown([("b", [])], [], 0 * weights)]
    assert "<b>1.80</b>" in html_page(requests, ["a", "b"], ["x.0.y"], ABOUT)  # 1.5^2 / 1.25


def test_names_of_attached_linears_are_the_trace_s(mole):
    """Without it the rows of the heat map are other layers than its title says."""
    list(stream(mole, "the fox", method="meteora_top2", routing=True, max_new_tokens=1))
    paths = list(attached(mole.model))
    recorder = Recorder(mole.model, 1)
    assert [mole.model.get_submodule(path) for path in paths] == recorder.linears
