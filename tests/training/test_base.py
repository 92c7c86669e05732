"""Pretraining a base: it learns, transformers reads it, documents are packed whole, in parts = at
once."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from common.files import InputError
from common.tokenizer import Tokenizer
from helpers_training import options, run, run_folder
from model import Llama, load_llama
from training import base as train_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    o = options("base", None, tmp_path_factory.mktemp("base") / "out", steps=30, lr=1e-2, save_every=30)
    run(o)
    return o


def test_base_learns(base):
    """Without it a base that never moved from its random start would pass for trained."""
    rows = list(csv.DictReader((run_folder(base) / "log.csv").open()))
    assert float(rows[0]["loss"]) == pytest.approx(math.log(307), rel=0.02)  # random weights of 0.02: uniform
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])


def test_transformers_reads_our_base(base):
    """Without it the folder that `train.py base` writes is a Llama by our own reading alone."""
    from helpers_oracles import LlamaForCausalLM

    model, tokenizer = load_llama(base.model, torch.float32), Tokenizer(base.model)
    ids = tokenizer.encode("[INST] the lazy dog [/INST]\n2024")
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    pieces = [tokenizer.decode([i]).strip(" ") for i in ids]
    assert [p for p in pieces if p in ("[", "[/", "]", "\n")] == ["[", "]", "[/", "]", "\n"]
    assert pieces[-4:] == ["2", "0", "2", "4"]
    theirs = LlamaForCausalLM.from_pretrained(base.model, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    torch.testing.assert_close(model(torch.tensor([ids])), expected, rtol=1e-5, atol=1e-5)
    assert theirs.config.eos_token_id == tokenizer.eos_id and theirs.config.bos_token_id == tokenizer.bos_id


def test_base_in_parts_equals_at_once(tmp_path):
    """Without it micro_tokens changes the base: the last, smaller part would weigh as much as a
    full one."""
    logs = []
    for micro_tokens in (26, 10_000):  # parts of 2, 2 and 1 windows of 13
        o = options("base", None, tmp_path / str(micro_tokens) / "out", micro_tokens=micro_tokens, steps=3)
        run(o)
        logs.append(
            [[float(x) for x in row.values()] for row in csv.DictReader((run_folder(o) / "log.csv").open())]
        )
    assert len(logs[0]) == 3
    for parts, whole in zip(*logs, strict=True):
        assert parts == pytest.approx(whole, rel=1e-4)  # the log has six digits


def test_base_trained_again_has_the_tokenizer_that_was_asked_for(tmp_path):
    """Without it --vocab_size of a second run is ignored in silence: the first run's tokenizer
    stays."""
    o = options("base", None, tmp_path / "out", steps=1)
    run(o)
    run(o, vocab_size=311)
    assert len(Tokenizer(o.model)) == 311
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 311


def test_documents_are_what_stands_between_empty_lines(tmp_path, monkeypatch):
    """Without it a document ends at each line break, and a model trained on lines never sees a
    question and its answer in one context; or one that begins without BOS or ends without EOS
    teaches no end at all."""
    documents = ["the dog\n fox", "what is\nthe plural of\nmouse", "sort these words"]
    o = options("base", None, tmp_path / "out", steps=1)
    text = tmp_path / "text.txt"
    text.write_text(f"\n{documents[0]}\n\n\n\n{documents[1]}\n\n{documents[2]}\n" * 12)
    run(o, text=str(text), vocab_size=300)
    tokenizer, windows = Tokenizer(o.model), []
    one = [i for document in documents for i in (*tokenizer.encode(document + "\n"), tokenizer.eos_id)]
    assert one.count(tokenizer.bos_id) == one.count(tokenizer.eos_id) == 3

    class Seen(Llama):
        def __init__(self, config):
            super().__init__(config)
            self.register_forward_pre_hook(lambda module, args: windows.extend(args[0].tolist()))

    monkeypatch.setattr(train_base, "Llama", Seen)
    run(
        o, text=str(text), vocab_size=300, block_size=len(one) * 12 - 1, batch_size=1
    )  # the only window there is
    assert windows == [(one * 12)[:-1]]
    with pytest.raises(InputError, match=f"{len(one) * 12} tokens, expected more than --block_size"):
        run(o, text=str(text), vocab_size=300, block_size=len(one) * 12)


def test_a_model_of_others_is_not_overwritten(small_model, tmp_path):
    """Without it a model folder given by mistake is replaced by a random one that was trained for a
    minute."""
    o = options("base", None, tmp_path / "out", steps=1)
    shutil.copytree(small_model, o.model)
    with pytest.raises(InputError, match="a model that this command didn't make"):
        run(o)
    want = (small_model / "model.safetensors").read_bytes()
    assert (Path(o.model) / "model.safetensors").read_bytes() == want
