"""Checked reading and atomic writing of text and JSON; the error for bad input, and warnings.

Every file of a user passes through here. So a truncated download, a Git LFS pointer or a pickle
under a .safetensors name gets one clear line instead of a traceback or, worse, a half-loaded model.
Files are written beside their target, flushed to disk and renamed: a kill at any moment leaves the
earlier file whole, and two processes never write into one file.
"""

import contextlib
import fcntl
import functools
import glob
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.printable import printable, shown

MESSAGE = 1000  # characters of a message, at most
LARGEST_STREAM = 2**30  # bytes that are read of a pipe or a device, which may have no end
MARK = {"made_by": "nanomole"}  # in what may be removed or replaced later: nothing else is


class InputError(Exception):
    """Bad input. The message is one line: file, field, what was found, what was expected."""


def say(message: str) -> None:
    """One line on standard error. The message may hold any text, and need not be printable."""
    print(printable(message, MESSAGE), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """say(), as a warning."""
    say(f"warning: {message}")


@functools.cache
def warn_once(message: str) -> None:
    """warn(), unless this process has said the same already."""
    warn(message)


# Reading ------------------------------------------------------------------------------------------


def foreign_format(head: bytes) -> str | None:
    """What a file is that begins with `head`, if plainly not safetensors or JSON, else None."""
    text = head.lstrip().lower()
    convert = "convert it with safetensors.torch.save_file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository"
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page (a failed download?): fetch the file again"
    if head.startswith(b"PK\x03\x04"):
        return f"a zip archive, probably a torch .bin checkpoint: {convert}"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return f"a pickle, which can run code when loaded: {convert}"
    return None


def read_bytes(path: str | Path, pipe: bool = False) -> bytes:
    """The file's bytes. Raises InputError where it is missing, a folder or not readable, and for a
    pipe or a device, from which reading may never end.

    `pipe` is for a file that the user names: a shell's <(...) is a pipe. Of a pipe or a device it
    raises InputError for more than LARGEST_STREAM bytes.
    """
    if not pipe:
        check_regular(path)
    try:
        with open(path, "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
            data = bytearray()
            while len(data) <= LARGEST_STREAM and (more := file.read(1 << 20)):
                data += more
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise InputError(f"{path}: no file can have this name: {error}") from None
    if len(data) > LARGEST_STREAM:
        raise InputError(f"{path}: no file, and has more than {LARGEST_STREAM:,} bytes")
    return bytes(data)


def check_regular(path: str | Path) -> None:
    """Raises InputError for a pipe or a device."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path}: is a pipe or a device, expected a file")


def read_known(path: str | Path, pipe: bool = False) -> bytes:
    """read_bytes. Raises InputError for a Git LFS pointer, a web page, a zip or a pickle."""
    data = read_bytes(path, pipe)
    if stranger := foreign_format(data[:512]):
        raise InputError(f"{path}: is {stranger}")
    return data


def read_text(path: str | Path, pipe: bool = False) -> str:
    """The file's text; see read_bytes. Raises InputError where it can't be read or isn't UTF-8."""
    data = read_known(path, pipe)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse_json(text: str, where: str | Path, is_line: bool = False, once: bool = False) -> Any:
    """JSON text -> value. Raises InputError naming `where`, line and column; the column alone where
    `where` names the line already, as the text is one line of a file. With `once` an object that has
    a name twice is refused; else, as in other programs, the last value counts."""
    try:
        return json.loads(text, object_pairs_hook=_without_doubles if once else None)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if is_line else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: bad JSON at {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets nested too deep
        raise InputError(f"{where}: bad JSON: {error}") from None


def _without_doubles(pairs):
    """The dict of an object's pairs."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"lists a name twice: {shown(name)}")
        found[name] = value
    return found


def read_json(path: str | Path, once: bool = False) -> dict:
    """The JSON object of a file; see parse_json. Raises InputError with path and line."""
    value = parse_json(read_text(path), path, once=once)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_text(text: str, where: str) -> None:
    """Raises InputError where `text` is no UTF-8: JSON may hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"character {error.start} is {text[error.start]!r}"
        raise InputError(f"{where}: {found}, half a surrogate pair") from None


def read_jsonl(path: str | Path, keys: Iterable[str], pipe: bool = False) -> list[dict]:
    """The objects of a .jsonl file; each must have a text under every key of `keys`. `pipe` as in
    read_bytes."""
    rows = []
    for number, line in enumerate(read_text(path, pipe).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}:{number}", is_line=True)
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise InputError(f"{path}:{number}: expected an object with the text field {key!r}")
            check_text(row[key], f"{path}:{number}: {key}")
        rows.append(row)
    return rows


# Writing ------------------------------------------------------------------------------------------


def check_writable(path: str | Path) -> None:
    """Raises InputError unless a file can be written there, in a folder that exists: asked before the
    work, not after it."""
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if os.path.isdir(real):
        raise InputError(f"{path}: is a directory, expected a file to write")
    if not os.path.isdir(folder):
        raise InputError(f"{path}: can't be written: there is no folder {folder}")
    is_device = os.path.exists(real) and not os.path.isfile(real)  # nothing is renamed to it
    try:
        os.lstat(real if is_device else _partial_of(Path(real)))  # a partial file's name is longer
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: can't be written: {error.strerror or error}") from None
    if not os.access(real if is_device else folder, os.W_OK):
        raise InputError(f"{path}: can't be written: you may not write to {real if is_device else folder}")


def write_bytes(path: str | Path, *parts: bytes | memoryview, pipe: bool = False) -> None:
    """Writes `parts` beside `path`, flushes to disk, renames: readers see the old file or the new.

    Of several writers the last one wins, and each writes a file of its own: .NAME.HEX.partial,
    locked until it is complete. Raises InputError where it can't be written, and for a pipe, whose
    reader may never come, or a device. `pipe` is for a file that the user names: it may be either.
    """
    if not pipe:
        check_regular(path)
    path = Path(os.path.realpath(path))  # a link stays a link
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A device or a pipe has no earlier content to keep; a folder gives an OSError.
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                file.write(b"".join(parts))
            return
        _remove_leftovers(path)
        with _open_partial(path) as file:
            partial = Path(file.name)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    finally:
        if partial:
            with contextlib.suppress(OSError):  # it is gone, if all went well: it was renamed
                partial.unlink()


def _open_partial(path):
    """A new file beside `path`, locked until it is closed or its writer dies."""
    while True:
        file = open(_partial_of(path), "xb")  # noqa: SIM115 (x: O_EXCL, which follows no link)
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):
            return file
        file.close()  # another writer took it for a leftover before it was locked


def _partial_of(path):
    """A new name beside `path`, for what is still being written."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _remove_leftovers(path):
    """Removes the partial files of `path` that nobody holds locked: their writers were killed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.partial"):
        with contextlib.suppress(OSError), open(partial, "rb+", opener=open_no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def open_no_link(path: str, flags: int) -> int:
    """An opener for open(), of files that anybody may have put there: a link is an OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # nor does a pipe block


def write_text(path: str | Path, text: str, pipe: bool = False) -> None:
    """write_bytes of `text` as UTF-8. Raises InputError for half a surrogate pair, which is no text."""
    check_text(text, f"{path}")
    write_bytes(path, text.encode("utf-8"), pipe=pipe)


def write_json(path: str | Path, value: Any) -> None:
    """write_bytes of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """write_bytes of `rows` as one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
