"""Checked reading and atomic writing of safetensors and JSON, hashes, and the one error type that
means "bad input".

Everything that comes from a user's disk passes through here, so that a truncated download, a Git
LFS pointer or a pickle under a .safetensors name gets one clear line instead of a traceback or,
worse, a half-loaded model. Files are written beside their target, flushed to disk and renamed: a
kill at any moment leaves the earlier file whole.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


class InputError(Exception):
    """Bad input: the message is one line that names file, field, what was found and what was
    expected."""


def run_script(main):
    """Runs `main()` as a command: InputError is one line and exit status 2, Ctrl-C 130, a closed
    pipe 141."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that can't show ó
    _keep_memory()
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails once more
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, a folder that can't be written
        name = error.filename2 or error.filename or "standard output"  # of a rename, the target
        print(f"error: {name}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _keep_memory():
    """Tells glibc to keep up to 1 GiB of freed memory: given back at once, as it does with large
    tensors, each page is cleared and mapped anew, a tenth of the time of a long prompt in a large
    model (LOG.md)."""
    if mallopt := getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None):
        M_TRIM_THRESHOLD = -1
        M_MMAP_THRESHOLD = -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**30), mallopt(M_MMAP_THRESHOLD, 2**30)


def warn(message):
    """One line on standard error."""
    print(f"warning: {message}", file=sys.stderr)


# Reading ------------------------------------------------------------------------------------------------------------


def _stranger(head):
    """What a file is that starts with bytes `head` and should have been safetensors or JSON, or
    None."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run 'git lfs pull' in its repository"
    if text.startswith((b"<!doctype", b"<html")):
        return "an HTML page (a failed download?): fetch the file again"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, probably a torch .bin checkpoint: convert it with safetensors.torch.save_file"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which can run code when loaded: convert it with safetensors.torch.save_file"
    return None


def read_bytes(path):
    """The file's bytes, or InputError where it is missing, a folder or not readable."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def read_known(path):
    """read_bytes, or InputError where the file is plainly something else: a Git LFS pointer, a web
    page, a zip."""
    data = read_bytes(path)
    if stranger := _stranger(data[:512]):
        raise InputError(f"{path}: is {stranger}")
    return data


def read_text(path):
    """The file's text. Raises InputError where it can't be read or isn't UTF-8."""
    data = read_known(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None


def parse_json(text, where):
    """JSON text -> value. Raises InputError naming `where`, line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: bad JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested too deep
        raise InputError(f"{where}: bad JSON: {error}") from None


def read_json(path):
    """A JSON object (dict). Raises InputError with path and line."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_text(text, where):
    """Raises InputError where `text` can't be written as UTF-8: JSON may hold half a surrogate
    pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {text[error.start]!r}, half a surrogate pair"
        ) from None


def read_jsonl(path, keys):
    """The objects of a .jsonl file; each must hold every key of `keys` as a string."""
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


def _check_header(path):
    """Raises InputError unless the file holds as many bytes as its safetensors header promises."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(512)
            length = int.from_bytes(head[:8], "little")
            if stranger := _stranger(head):
                raise InputError(f"{path}: is {stranger}")
            if size < 8 or 8 + length > size:
                raise InputError(
                    f"{path}: truncated: {size} bytes present, its header alone promises {8 + length}"
                )
            file.seek(8)
            header = parse_json(file.read(length).decode("utf-8", "replace"), f"{path} (header)")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    tensors = [v for k, v in header.items() if k != "__metadata__"] if isinstance(header, dict) else [None]
    try:
        promised = 8 + length + max((t["data_offsets"][1] for t in tensors), default=0)
    except (TypeError, KeyError, IndexError):
        raise InputError(f"{path}: not a safetensors file: its header doesn't list tensors") from None
    if promised != size:
        raise InputError(
            f"{path}: truncated or damaged: {size} bytes present, its header promises {promised}"
        )


@contextlib.contextmanager
def open_safetensors(path):
    """An open safetensors file (keys(), get_tensor(name), metadata()), checked before anything is
    read from it."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: {error}") from None


def read_safetensors(path):
    """({name: tensor}, {metadata key: string}), every value finite. Raises InputError naming the
    tensor."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    return tensors, metadata


def read_metadata(path):
    """The metadata of a safetensors file, {} where it has none."""
    with open_safetensors(path) as file:
        return file.metadata() or {}


def read_header(path):
    """{name: tensor on the meta device} of a safetensors file: shapes alone, no data is read."""
    with open_safetensors(path) as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def check_finite(path, name, tensor):
    """NaN or Inf in a weight can give finite wrong logits (silu(-inf) = 0), so they are refused at
    load."""
    if tensor.is_floating_point() and tensor.numel():
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch compares no float8
        ends = torch.stack(
            torch.aminmax(wide)
        )  # NaN in both where there is one; unlike a sum, without a copy
        if not torch.isfinite(ends).all():
            bad = int((~torch.isfinite(wide)).sum())
            raise InputError(f"{path}: {name} holds {bad} NaN or Inf values of {tensor.numel()}")


# Writing ------------------------------------------------------------------------------------------------------------


def write_bytes(path, *parts):
    """Writes `parts` beside `path`, flushes to disk, renames: readers see the old file or the new
    one. Raises InputError where it can't be written."""
    path = Path(os.path.realpath(path))  # a link stays a link
    partial = path.with_name(
        f".{path.name}.partial"
    )  # one name: what a kill leaves behind, the next save overwrites
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (
            path.exists() and not path.is_file()
        ):  # a device, a pipe: nothing to keep whole; a folder: an OSError
            with open(path, "wb") as file:
                file.write(b"".join(parts))
            return
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: {error.strerror or error}") from None


def write_text(path, text):
    """write_bytes of `text` as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path, value):
    """write_bytes of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    """write_bytes of `rows` as one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_safetensors(path, tensors, metadata=None):
    """`tensors` {name: tensor} and `metadata` {key: string} as a safetensors file that PEFT and
    transformers read; the same bytes each time."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = memoryview(save(tensors, {"format": "pt"} | (metadata or {})))
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:begin]))
    header["__metadata__"] = dict(
        sorted(header["__metadata__"].items())
    )  # save() has another order in each process
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, len(text).to_bytes(8, "little"), text, data[begin:])


# Hashes -------------------------------------------------------------------------------------------------------------


def hash_tensors(tensors, extra=""):
    """sha256 over the sorted (key, dtype, shape, bytes) of `tensors`, and over `extra`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    digest.update(extra.encode())
    return digest.hexdigest()
