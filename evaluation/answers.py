"""Answers of a method on a task, and what keeps them, so that a run goes on where it was stopped."""

import hashlib
import re
import shutil
import time
from pathlib import Path

from common.files import read_json, warn, write_json
from decoding.loop import decode
from decoding.prompts import by_length, encode_prompt
from decoding.sampling import Sampling
from methods.batch import retrieve, set_methods


def answer_all(mole, prompts, method, args, exclude=()):
    """Greedy answers to `prompts` without the adapters of `exclude`, batched by length, in their
    own order."""
    ids = [encode_prompt(mole, prompt) for prompt in prompts]
    found = retrieve(mole, [method] * len(ids), prompts, args.retrieve, exclude, ids)
    texts = [""] * len(ids)
    for rows in by_length(ids, args.batch_size):
        some = [found[j] for j in rows]
        set_methods(
            mole, [method] * len(rows), args.top_k, args.gate_temperature, retrieved=some, exclude=exclude
        )
        for token in decode(mole, [ids[j] for j in rows], Sampling(args.max_new_tokens)):
            texts[rows[token.row]] += token.text
    return texts


class AnswerCache:
    """OUT/cells: the answers of each method on each task, written as they are done; a later run
    with the same options, base and adapters takes them from there, a run with others begins anew.
    """

    def __init__(self, out, meta):
        self.folder = Path(out) / "cells"
        known = self.folder / "meta.json"
        if self.folder.exists() and (not known.exists() or read_json(known) != meta):
            warn(f"{self.folder}: of a run with other options, base or adapters: begins anew")
            shutil.rmtree(self.folder)
        if not known.exists():
            write_json(known, meta)

    def get(self, name, make):
        """What make() returned for the cell `name`, now or earlier, with the "seconds" that it
        took."""
        safe = re.sub(r"[^\w.-]", "_", name) + "-" + sha256(name.encode())[:8]
        file = self.folder / f"{safe}.json"
        if not file.exists():
            begin = time.perf_counter()
            made = make()
            write_json(file, made | {"seconds": round(time.perf_counter() - begin, 3)})
        return read_json(file)

    def remove(self):
        """Deletes what is kept: the run is over."""
        shutil.rmtree(self.folder)


def sha256(data):
    """The hash of `data` (bytes), hexadecimal."""
    return hashlib.sha256(data).hexdigest()
