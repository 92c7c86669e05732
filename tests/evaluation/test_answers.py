"""The kept answers of a stopped eval.py, damaged: one line, and no wrong score."""

import json

import pytest

from common.files import InputError
from evaluation.answers import AnswerCache

MADE = {"answers": ["one\n", "twö", ""], "n": {3: 1.5}}


def damaged(cells, change):
    """get() of a cell whose object was changed."""
    (file,) = (file for file in cells.folder.glob("*.json") if file != cells.meta)
    raw = json.loads(file.read_text(encoding="utf-8"))
    change(raw)
    file.write_text(json.dumps(raw), encoding="utf-8")
    return cells.get("base on x", lambda: pytest.fail("computed again"))


def test_a_kept_answer(tmp_path):
    """Without it a cell that was read back differs from the one that was computed."""
    cells = AnswerCache(tmp_path, {"base": "x"})
    first = cells.get("base on x", lambda: MADE)
    assert first["answers"] == MADE["answers"] and first["n"] == {"3": 1.5} and "hash" not in first
    again = AnswerCache(tmp_path, {"base": "x"}).get("base on x", lambda: pytest.fail("computed again"))
    assert again == first == damaged(cells, lambda raw: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("seconds"),
        lambda raw: raw.pop("answers"),
        lambda raw: raw.pop("hash"),
        lambda raw: raw["answers"].pop(),
        lambda raw: raw.update(answers=["one\n", "two", ""]),
        lambda raw: raw.update(answers=None),
        lambda raw: raw.update(seconds="1"),
        lambda raw: raw.update(n={"3": 1e400}),
        lambda raw: raw.update(hash=5),
        lambda raw: raw.update(other=1),
    ],
)
def test_a_damaged_answer(tmp_path, change):
    """Without it an answer that is gone is a traceback, and another one is scored without a word."""
    cells = AnswerCache(tmp_path, {"base": "x"})
    cells.get("base on x", lambda: MADE)
    with pytest.raises(InputError, match=r"base_on_x-.*\.json: damaged or .*remove it"):
        damaged(cells, change)
