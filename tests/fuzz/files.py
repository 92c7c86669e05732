"""Damage to whole files, to bytes and to lines: what any kind of file may meet."""

import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

from fuzz.values import damage_json, json_value, text

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return out.getvalue()


INSTEAD = {
    "empty": b"", "LFS pointer": LFS, "HTML": b"<!DOCTYPE html><html>404</html>", "zip": _zip(),
    "pickle": pickle.dumps({"a": 1}), "NULs": b"\x00" * 100, "escapes": b"\x1b[2J\x1b]0;x\x07", "FFs": b"\xff" * 99,
    "JSON list": b"[]", "JSON object": b"{}", "JSON null": b"null", "a number": b"7" * 5000, "deep": b"[" * 100000,
    "deep objects": b'{"a":' * 100000, "newlines": b"\n" * 5000, "long line": b"z" * 3_000_000,
}  # fmt: skip


def replace_file(rng: random.Random, file: Path, named: bool = False) -> str:
    """Another thing where the file was; says what. A file that is `named` on the command line may be
    a pipe, for whose writer the program rightly waits: there it isn't tried."""
    others = ["directory", "dangling link", "link to itself", "missing", "unreadable link", "device"]
    kind = rng.choice([*INSTEAD, *others, *([] if named else ["pipe"])])
    file.unlink()
    if kind in INSTEAD:
        file.write_bytes(INSTEAD[kind])
    elif kind == "directory":
        file.mkdir()
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "unreadable link":
        file.symlink_to("/proc/self/mem")
    elif kind == "device":
        file.symlink_to("/dev/null")
    elif kind == "pipe":
        os.mkfifo(file)
    return f"{file.name} is {kind}"


def damage_bytes(rng: random.Random, file: Path, within: int | None = None) -> str:
    """Truncates the file, or flips, inserts or removes some of its first `within` bytes."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(max(1, min(within or len(data), len(data))))
    kind = rng.choice(["truncated", "bit", "byte", "insert", "remove", "extend", "BOM", "utf-16", "twice"])
    if kind == "truncated":
        del data[at:]
    elif kind == "bit" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte" and data:
        data[at] = rng.choice([0, 0x1B, 0xFF, ord('"'), ord("{"), 0x9B, rng.randrange(256)])
    elif kind == "insert":
        data[at:at] = rng.choice(
            [b"\x00", b"\x1b[31m", b"\xed\xa0\x80", b",", b'"', b"\xff\xfe", b"9" * 5000]
        )
    elif kind == "remove":
        del data[at : at + rng.choice([1, 2, 8, 100])]
    elif kind == "extend":
        data += rng.choice([b"\x00", b"x", b"}", b"\n\n", bytes(1000)])
    elif kind == "BOM":
        data[:0] = b"\xef\xbb\xbf"
    elif kind == "utf-16":
        data = bytearray(bytes(data).decode("latin-1").encode("utf-16"))
    else:
        data = data * 2
    file.write_bytes(bytes(data))
    return f"{file.name}: {kind} at byte {at}"


def damage_json_file(rng: random.Random, file: Path) -> str:
    """Damages the JSON of a file: mostly its values, else its bytes, else the whole file."""
    draw = rng.random()
    if draw < 0.1:
        return replace_file(rng, file)
    if draw < 0.2:
        return damage_bytes(rng, file)
    written, done = damage_json(rng, json.loads(file.read_text()))
    file.write_text(written)
    return f"{file.name}: {done}"


def damage_jsonl_file(rng: random.Random, file: Path, named: bool = False) -> str:
    """damage_json_file of one line of a file; `named` as in replace_file()."""
    lines = file.read_text().splitlines()
    draw = rng.random()
    if draw < 0.1:
        return replace_file(rng, file, named)
    if draw < 0.25:
        return damage_bytes(rng, file)
    at = rng.randrange(len(lines))
    if draw < 0.35:
        row = json.loads(lines[at])
        row[rng.choice(sorted(row))] = new = rng.choice([text(rng), json_value(rng)])
        lines[at], done = json.dumps(row), repr(new)[:80]
    else:
        lines[at], done = damage_json(rng, json.loads(lines[at]))
    file.write_text("\n".join(lines) + "\n")
    return f"{file.name}:{at + 1}: {done}"
