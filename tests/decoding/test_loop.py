"""One model that several threads ask, answers that end at a text, logits that aren't finite."""

import gc
import threading

import pytest
import torch

from common.files import InputError
from decoding.loop import AnswerText, decode, tokens_until_full
from decoding.sampling import Sampling, sample
from decoding.stream import compile_for
from generate import answer, load, stream
from methods.batch import set_methods

METHODS = ["base", "adapter:bee", "meteora_top2", "average_ab", "arrow", "ties_ba"]


@pytest.fixture(scope="module")
def mole(small_model, pool_with_every_part):
    return load(small_model, pool_with_every_part)


# Threads ------------------------------------------------------------------------------------------


def test_threads_get_their_own_answers(mole):
    """Without the lock most answers belong to another thread's request, or are an obscure error."""
    prompts = [f"the fox {j}" for j in range(4)]
    asked = [(prompt, METHODS[(3 * j + turn) % 6]) for j, prompt in enumerate(prompts) for turn in range(15)]
    options = {"max_new_tokens": 3}
    want = {(prompt, method): answer(mole, prompt, method=method, **options) for prompt, method in set(asked)}
    assert len({str(text) for text in want.values()}) > 12
    wrong = []

    def work(mine):
        for prompt, method in mine:
            try:
                got = answer(mole, prompt, method=method, **options)
            except Exception as error:  # whatever it is, the test shows it
                got = error
            if got != want[prompt, method]:
                wrong.append((prompt, method, got))

    threads = [threading.Thread(target=work, args=(asked[15 * j :][:15],)) for j in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


def test_a_newer_batch_ends_an_older_stream(mole):
    """Without it the older stream's next token would be computed by the newer batch's method."""
    older = stream(mole, "the fox", method="adapter:bee", max_new_tokens=9)
    next(older)
    text = answer(mole, "the fox", method="base", max_new_tokens=5)
    with pytest.raises(RuntimeError, match="another batch began on this model"):
        next(older)
    assert text == answer(mole, "the fox", method="base", max_new_tokens=5)


def test_a_stream_left_half_way_blocks_nobody(mole):
    """Without it a web page that is closed early would stop the server, or later answers would be
    recorded into nothing."""
    left = stream(mole, "the fox", method="meteora_top2", max_new_tokens=9, routing=True)
    next(left)
    seen = []

    def work():
        for token in stream(mole, "the fox", method="meteora_top2", max_new_tokens=4, routing=True):
            seen.append(token.adapters)
            left.close()
            gc.collect()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(seen) == 4 and all(seen)


def test_the_lock_is_free_between_steps(mole):
    """Without it a thread that asks while another's stream is suspended would wait for ever."""
    tokens = stream(mole, "the fox", max_new_tokens=5)
    next(tokens)
    taken = []
    thread = threading.Thread(target=lambda: taken.append(mole.lock.acquire(timeout=1)))
    thread.start()
    thread.join()
    assert taken == [True]
    mole.lock = threading.RLock()  # the thread ended with the old one


# Stop strings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 5])
def test_an_answer_ends_before_its_stop_string(mole, width):
    """Without it the stop is shown, or missed where it spans two tokens."""
    prompt = "what is the lazy dog"
    whole = answer(mole, prompt, method="adapter:bee", max_new_tokens=24)[0]
    assert len(whole) > 12
    for start in range(1, len(whole) - width):
        stop = whole[start : start + width]
        tokens = list(
            stream(mole, prompt, method="adapter:bee", max_new_tokens=24, stop=[stop, "never there"])
        )
        assert "".join(token.text for token in tokens) == whole[: whole.index(stop)], stop
        assert tokens[-1].finish == "stop"


def test_stops_are_each_prompts_own(mole):
    """Without it one request's stop would cut another's answer."""
    options = {"method": "adapter:bee", "max_new_tokens": 12}
    prompts = ["the fox", "the lazy dog"]
    one, two = answer(mole, prompts, **options)
    assert answer(mole, prompts, stops=[[one[2:4]], []], **options) == [one[: one.index(one[2:4])], two]


class Letters:
    """A tokenizer whose ids are characters."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_text_that_only_began_like_a_stop_is_shown():
    """Without it what was held back at the end of an answer would be lost."""
    text = AnswerText(Letters(), ["abab!", "xyz"])
    shown = [text.push(ord(letter)) for letter in "cababxy"]
    assert shown == ["c", "", "", "", "", "abab", ""]
    assert text.flush() == "xy" and not text.stopped


# Logits that aren't finite ------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_refused(small_model, temperature):
    """Without it a float16 model whose activations overflow prints its first token for ever."""
    mole = load(small_model, dtype="float16")
    mole.model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
    said = "prompt 1: logits are not finite in float16: --dtype bfloat16 or float32"
    with pytest.raises(InputError, match=said):
        answer(mole, "the fox", temperature=temperature)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_marked_and_others_are_not(bad, temperature):
    """Without it one bad request would take the whole batch with it, or pass."""
    logits = torch.zeros(3, 7)
    logits[:, 5] = 50.0
    logits[1, 2] = bad
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    assert sample(logits, Sampling(temperature=temperature), generators).tolist() == [5, -1, 5]


# What the context allows --------------------------------------------------------------------------


def test_what_the_context_does_not_allow_costs_nothing(mole, monkeypatch):
    """Without it --max_new_tokens 20000 compiles for two minutes, for tokens that never come."""
    asked = []
    monkeypatch.setattr("decoding.stream.compile_blocks", lambda model, on, saves, costs: asked.append(saves))
    ids = [[1, 2, 3], [4] * 7]
    room = tokens_until_full(mole, 3)
    assert room == mole.model.config.max_position_embeddings - 2
    for count in (5, room, 20000):
        compile_for(mole, None, ids, Sampling(max_new_tokens=count))
    assert asked[0] < asked[1] == asked[2]
    set_methods(mole, ["base"])
    assert len(list(decode(mole, [[1, 2, 3]], Sampling(max_new_tokens=20000)))) <= room
