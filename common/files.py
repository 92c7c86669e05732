"""Checked reading and atomic writing of text and JSON, and the error for bad input.

Every file of a user passes through here. So a truncated download, a Git LFS pointer or a pickle
under a .safetensors name gets one clear line instead of a traceback or, worse, a half-loaded model.
Files are written beside their target, flushed to disk and renamed: a kill at any moment leaves the
earlier file whole, and two processes never write into one file.
"""

import contextlib
import ctypes
import fcntl
import functools
import gc
import glob
import io
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MARK = {"made_by": "nanomole"}  # in what may be removed or replaced later: nothing else is


class InputError(Exception):
    """Bad input. The message is one line: file, field, what was found, what was expected."""


def run_script(main: Callable[[], None]) -> None:
    """Runs `main()` as a command.

    InputError becomes one line and exit status 2. The status of Ctrl-C is 130, of a closed pipe
    141.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without ó
    _keep_memory()
    gc.freeze()  # spares a later garbage collection all that was imported, which takes 0.1 s
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())  # otherwise the flush at exit fails again
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, a folder that can't be written
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: OSError) -> str:
    """The file that the system couldn't read or write, and why."""
    name = error.filename2 or error.filename or "standard output"  # a rename's target
    return f"{name}: {error.strerror or error}"


def _keep_memory():
    """Tells glibc to keep up to 1 GiB of freed memory.

    By default it returns large tensors to the system at once, and the next one needs its pages
    mapped and cleared again: a tenth of the time of a long prompt in a large model (LOG.md).
    """
    if mallopt := getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None):
        M_TRIM_THRESHOLD = -1
        M_MMAP_THRESHOLD = -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**30)


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr)


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


def read_bytes(path: str | Path) -> bytes:
    """The file's bytes. Raises InputError where it is missing, a folder or not readable."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def read_known(path: str | Path) -> bytes:
    """read_bytes. Raises InputError for a Git LFS pointer, a web page, a zip or a pickle."""
    data = read_bytes(path)
    if stranger := foreign_format(data[:512]):
        raise InputError(f"{path}: is {stranger}")
    return data


def read_text(path: str | Path) -> str:
    """The file's text. Raises InputError where it can't be read or isn't UTF-8."""
    data = read_known(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse_json(text: str, where: str | Path) -> Any:
    """JSON text -> value. Raises InputError naming `where`, line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: bad JSON at {place}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets nested too deep
        raise InputError(f"{where}: bad JSON: {error}") from None


def read_json(path: str | Path) -> dict:
    """The JSON object of a file. Raises InputError with path and line."""
    value = parse_json(read_text(path), path)
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


def read_jsonl(path: str | Path, keys: Iterable[str]) -> list[dict]:
    """The objects of a .jsonl file; each must have a text under every key of `keys`."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}:{number}")
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise InputError(f"{path}:{number}: expected an object with the text field {key!r}")
            check_text(row[key], f"{path}:{number}: {key}")
        rows.append(row)
    return rows


# Writing ------------------------------------------------------------------------------------------


def check_writable(path: str | Path) -> None:
    """Raises InputError unless a file can be written there: asked before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a directory, expected a file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{path}: can't be written: {folder} is no folder that you may write to")


def write_bytes(path: str | Path, *parts: bytes | memoryview) -> None:
    """Writes `parts` beside `path`, flushes to disk, renames: readers see the old file or the new.

    Of several writers the last one wins, and each writes a file of its own: .NAME.HEX.partial,
    locked until it is complete. Raises InputError where it can't be written.
    """
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
        if partial:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise InputError(f"{path}: {error.strerror or error}") from None


def _open_partial(path):
    """A new file beside `path`, locked until it is closed or its writer dies."""
    while True:
        name = f".{path.name}.{secrets.token_hex(8)}.partial"
        file = open(path.with_name(name), "xb")  # noqa: SIM115 (x: O_EXCL, which follows no link)
        with contextlib.suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):
            return file
        file.close()  # another writer took it for a leftover before it was locked


def _remove_leftovers(path):
    """Removes the partial files of `path` that nobody holds locked: their writers were killed."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.partial"):
        with contextlib.suppress(OSError), open(partial, "rb+", opener=open_no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def open_no_link(path: str, flags: int) -> int:
    """An opener for open(), of files that anybody may have put there: a link is an OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # nor does a pipe block


def write_text(path: str | Path, text: str) -> None:
    """write_bytes of `text` as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """write_bytes of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """write_bytes of `rows` as one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
