"""Words that a reader would not search for and names that were replaced: which word to use instead."""

import io
import re
import subprocess
import tokenize

from helpers_commands import ROOT

# {words in comments and strings: what to write instead}
ENGLISH = {
    r"spellings?": "backend",
    r"as (a )?products?": "matmul, GEMM",
    r"as sums": "a fused multiply-and-sum",
    r"joined with": "fused into",
    r"a graph of its own": "a recompile, a specialisation",
    r"one behind the other": "packed",
    r"turned": "transposed; rotated (RoPE)",
    r"words of the vocabulary": "vocabulary entries",
    r"behind": "after",
    r"few tokens": "a decode batch",
    r"many tokens": "a prompt (prefill)",
    r"lanes": "SIMD lanes",
    r"pieces?": "chunk",
    r"places": "slots",
    r"stands? in for": "a wrapped Linear",
    r"made for": "trained on (a base), trained with (adapters)",
    r"made of": "computed from",
    r"an hour of \d+ GB": "a run in which the memory reached N GB/s",
}
# What is meant literally, and how some error messages begin.
LITERAL = [r"(how|as) many tokens", r"SIMD lanes", r"(sentencepiece|byte) pieces", r"turn turned"]
LITERAL += [r"leaves behind", r"behind the same few methods"]
# {names in the code: what stands there now}
NAMES = {
    r"spellings?|SPELLINGS": "backend, BACKENDS",
    r"Own|OwnGate": "GroupedTokens, KnownAdapterGate",
    r"lora_own": "lora_grouped",
    r"lead": "gemm_advantage",
    r"at_once": "unroll_factor",
    r"in_pieces": "chunked",
    r"zero_B": "alloc_B",
    r"attend_one|attend_apart": "attend_decode, attend_packed",
    r"of_any_length": "mark_dynamic_tokens",
    r"at_most": "statically_at_most",
    r"FEW|LANES": "MAX_DECODE_ROWS, SIMD_LANES",
    r"steady": "replayable",
    r"Step": "CapturedStep",
    r"Rows": "TokenRows",
    r"rows_of": "batch_row_of_token",
    r"Follower": "SharedMixture",
    r"Context": "PackedExample",
    r"Cells": "AnswerCache",
    r"_Losses": "BlockwiseCrossEntropy",
    r"Apart": "InSubprocess",
    r"_serve": "_child",
    r"force": "force_adapters",
    r"late": "late_start",
    r"_light": "without_tensors",
}
TEXT = {"COMMENT", "STRING", "FSTRING_MIDDLE"}


def words(source):
    """(line, word found, word to use) of each word of the tables in a file's source."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.NAME:
            for pattern, instead in NAMES.items():
                if re.fullmatch(pattern, token.string):
                    yield line, token.string, instead
        elif tokenize.tok_name[token.type] in TEXT:
            text = token.string
            for pattern in LITERAL:
                text = re.sub(pattern.replace(" ", r"\s+"), lambda match: re.sub(r"\S", "_", match[0]), text)
            for pattern, instead in ENGLISH.items():
                for match in re.finditer(rf"\b({pattern})\b".replace(" ", r"\s+"), text):
                    yield line + text.count("\n", 0, match.start()), " ".join(match[0].split()), instead


def test_the_tables_find_their_words():
    """Without it a pattern that matches nothing looks like a clean house."""
    source = (
        'def lora_own(n):\n    """Summed\n    one  behind\n    the other"""  # spellings, as many tokens\n'
    )
    found = [("lora_own", 1), ("one behind the other", 3), ("behind", 3), ("spellings", 4)]
    assert [(word, line) for line, word, _ in words(source)] == found


def test_words_are_those_of_the_field():
    """Without it a reader meets one thing under two names, or under one that no search finds."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).exists():
            for line, word, instead in words((ROOT / name).read_text("utf-8")):
                found.append(f"{name}:{line}: {word!r}, use {instead!r}")
    assert not found, "\n".join(found)
