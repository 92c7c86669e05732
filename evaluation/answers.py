"""Answers of a method on a task, and a cache of them, so that a stopped run can go on."""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

from common.files import MARK, InputError, read_json, warn, write_json
from common.progress import track
from decoding.loop import decode
from decoding.prompts import by_length, encode_prompt
from decoding.sampling import Sampling
from methods.batch import retrieve, set_methods
from methods.session import Mole

Names = Collection[str]  # of adapters


def answer_all(mole: Mole, prompts: list[str], method: str, args, exclude: Names = ()) -> list[str]:
    """Greedy answers without the adapters of `exclude`: batched by length, returned in order."""
    ids = [encode_prompt(mole, prompt) for prompt in prompts]
    found = retrieve(mole, [method] * len(ids), prompts, args.retrieve, exclude, ids)
    texts = [""] * len(ids)
    for rows in track(by_length(ids, args.batch_size), f"batches of {method}"):
        routing = {"retrieved": [found[j] for j in rows], "exclude": exclude}
        set_methods(mole, [method] * len(rows), args.top_k, args.gate_temperature, **routing)
        for token in decode(mole, [ids[j] for j in rows], Sampling(args.max_new_tokens)):
            texts[rows[token.row]] += token.text
    return texts


class AnswerCache:
    """OUT/cells: the answers of each method on each task, written as soon as they are complete.

    A later run with the same options, base and adapters reads them; another run begins anew. Each
    file carries MARK, and none without it is removed: the folder may be somebody else's as well.
    """

    def __init__(self, out: Path | str, meta: dict):
        """Raises InputError where OUT/cells/meta.json is another program's."""
        self.folder = Path(out) / "cells"
        self.meta = self.folder / "meta.json"
        if self.meta.exists() and not _is_ours(self.meta):
            raise InputError(f"{self.meta}: another program wrote it: name another folder with --out")
        if self.meta.exists() and read_json(self.meta) != MARK | meta:
            warn(f"{self.folder}: of a run with other options, base or adapters: begins anew")
            self.remove()
        write_json(self.meta, MARK | meta)

    def get(self, name: str, make: Callable[[], dict]) -> dict:
        """What make() returned for the cell `name`, now or earlier, and the "seconds" it took."""
        safe = re.sub(r"[^\w.-]", "_", name) + "-" + sha256(name.encode())[:8]
        file = self.folder / f"{safe}.json"
        if not file.exists():
            begin = time.perf_counter()
            made = make() | {"seconds": round(time.perf_counter() - begin, 3)}
            write_json(file, MARK | made | {"hash": _hash(made)})
        kept = read_json(file)
        digest = kept.pop("hash", None)
        if digest != _hash({name: kept[name] for name in kept if name not in MARK}):
            found = "damaged or of an earlier version, its hash is another"
            raise InputError(f"{file}: {found}: remove it to have it computed again")
        return kept

    def remove(self) -> None:
        """Deletes the cache, once the run is complete; meta.json, which says whose it is, last."""
        files = sorted(self.folder.glob("*.json"), key=lambda file: file == self.meta)
        for file in files:
            if _is_ours(file):
                file.unlink()
        with contextlib.suppress(OSError):  # something else is in it
            self.folder.rmdir()


def _is_ours(file):
    with contextlib.suppress(InputError):
        return MARK.items() <= read_json(file).items()
    return False


def _hash(made):
    return sha256(json.dumps(made).encode())


def sha256(data: bytes) -> str:
    """The hash of `data`, hexadecimal."""
    return hashlib.sha256(data).hexdigest()
