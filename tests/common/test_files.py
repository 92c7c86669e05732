"""Checked reading, atomic writing, hashes."""

import fcntl
import json
import os
import pickle
import secrets
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from common import files
from common.files import (
    InputError,
    check_writable,
    read_bytes,
    read_json,
    read_jsonl,
    read_text,
    write_bytes,
    write_json,
    write_jsonl,
    write_text,
)
from common.tensors import (
    _check_header,
    check_finite,
    hash_tensors,
    open_safetensors,
    read_safetensors,
    write_safetensors,
)

TENSORS = {
    "a": torch.arange(35, dtype=torch.float32).view(5, 7),
    "b": torch.arange(3, dtype=torch.int64),
    "c": torch.full((2, 1, 3), 0.1, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 11),
    "one": torch.tensor(2.5, dtype=torch.float16),
    "yes": torch.tensor([True, False, True]),
}
WHOLE = save(TENSORS, {"format": "pt"})


def header(text, data=b""):
    text = text if isinstance(text, bytes) else text.encode()
    return len(text).to_bytes(8, "little") + text + data


def only_input_errors(path):
    """Reads the file both ways; whatever it holds, nothing but an InputError of one line that names
    it may come out."""
    for read in (_check_header, read_safetensors):
        try:
            read(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# Reading ------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=200)
    | st.builds(header, st.binary(max_size=60), st.binary(max_size=20))
    | st.builds(header, st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        | st.sampled_from(["F32", "I8"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["__metadata__", "data_offsets", "dtype", "shape", "w"]), inner, max_size=4),
        max_leaves=9).map(json.dumps), st.binary(max_size=20))
)  # fmt: skip
@example(b"")
@example(header("{}"))
@example(header('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}', b"\0" * 4))
@example(header('{"w": {"dtype": "F99", "shape": [4], "data_offsets": [0, 4]}}', b"\0" * 4))
@example(header('{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"\0" * 4))
@example(header('{"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', b"\0" * 4))
@example(header('{"w": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', b"\0" * 8))
@example(header('{"__metadata__": 1}'))
@example(header("[" * 100_000))
@example(header('{"w": ' + "1" * 5000 + "}"))
def test_any_bytes(tmp_path_factory, data):
    """Without it some damaged file is a KeyError or a RecursionError instead of a line that says
    which file it is."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    only_input_errors(path)


@pytest.mark.parametrize("first", [0x02, 0x03, 0x04, 0x05])
def test_a_header_of_any_length_is_no_pickle(tmp_path, first):
    """Without it one valid file in 2,048 is refused as a pickle: one whose header is 640, 896, 1152
    or 1408 bytes long, or 65,536 more, as these lengths begin with the bytes of a pickle."""
    path = tmp_path / "w.safetensors"
    for length in (first * 256 + 128, first * 256 + 128 + 65536):
        tensors = {"w": torch.arange(5.0)}
        write_safetensors(path, tensors, {"k": ""})
        short = int.from_bytes(path.read_bytes()[:8], "little")
        write_safetensors(path, tensors, {"k": "x" * (length - short)})
        assert path.read_bytes()[:2] == bytes([0x80, first])
        assert torch.equal(read_safetensors(path)[0]["w"], tensors["w"])
        assert torch.equal(load_file(path)["w"], tensors["w"])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_are_told_from_weights(tmp_path, protocol):
    """Without it a .bin under another name is a damaged file, and its owner fetches it again."""
    path = tmp_path / "w.safetensors"
    for value in ([1.0] * 99, {"w": b"\0" * 200_000}, {}, {"{": "{" * 300}):
        path.write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(InputError, match="a pickle, which can run code"):
            read_safetensors(path)
    torch.save({"w": torch.zeros(5)}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="a pickle, which can run code"):
        read_safetensors(path)


def test_every_truncation(tmp_path):
    """Without it a download cut at some length loads with garbage, or passes the check and crashes
    the reader."""
    path = tmp_path / "w.safetensors"
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        with pytest.raises(InputError, match=f"{length} bytes present"):
            _check_header(path)
    path.write_bytes(WHOLE)
    _check_header(path)


def test_appended(tmp_path):
    """Without it two files run together (a resumed download) pass for the first."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(WHOLE + b"\0")
    with pytest.raises(InputError, match=f"{len(WHOLE) + 1} bytes present.*promises {len(WHOLE)}"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "read", [read_bytes, read_text, read_json, read_safetensors, lambda p: read_jsonl(p, ())]
)
def test_missing_and_folder(tmp_path, read):
    """Without it a missing file or a folder in its place is a traceback in whoever reads it."""
    for path, says in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"{path}: {says}"):
            read(path)


def test_pipes_and_devices_do_not_hang(tmp_path, monkeypatch):
    """Without it a pipe in a downloaded folder would be waited for, and a device without an end
    would fill the memory."""
    os.mkfifo(tmp_path / "config.json")
    for read in (read_json, read_text, read_bytes, read_safetensors):
        with pytest.raises(InputError, match="config.json: is a pipe or a device, expected a file"):
            read(tmp_path / "config.json")
    monkeypatch.setattr(files, "LARGEST_STREAM", 1009)
    with pytest.raises(InputError, match="/dev/zero: no file, and has more than 1,009 bytes"):
        read_text("/dev/zero", pipe=True)
    reading, writing = os.pipe()
    os.write(writing, b"a prompt")
    os.close(writing)
    assert read_text(f"/dev/fd/{reading}", pipe=True) == "a prompt"  # as a shell's <(...) is read
    os.close(reading)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
@example(b"[" * 100_000)
@example(b"1" * 5000)
@example(b'{"a": NaN}')
@example(b"\xef\xbb\xbf{}")
def test_any_json(tmp_path_factory, data):
    """Without it some damaged config.json is another error than the one that scripts turn into a
    line."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    for read in (read_json, lambda p: read_jsonl(p, ("prompt",))):
        try:
            read(path)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_json_names_its_line(tmp_path):
    """Without it the reader of a thousand-line file searches the comma himself."""
    path = tmp_path / "a.json"
    path.write_text('{\n"a": 1,\n"b" 2}')
    with pytest.raises(InputError, match=f"{path}: bad JSON at line 3"):
        read_json(path)
    path.write_text('{"prompt": "a"}\n\n{"prompt": 2}\n')
    with pytest.raises(InputError, match=f"{path}:3: .*'prompt'"):
        read_jsonl(path, ("prompt",))


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    """Without it a prompt that holds U+2028 or a form feed is cut in two: str.splitlines() breaks
    there."""
    rows = [{"prompt": "a\u2028b\x0c\x85c\r"}, {"prompt": "ü\n"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl", ("prompt",)) == rows


# Finite -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_not_finite(tmp_path, bad, dtype):
    """Without it one broken weight among millions answers wrongly, and finitely where an activation
    swallows it."""
    tensor = torch.ones(5, 7, dtype=dtype)
    tensor[3, 2] = bad
    with pytest.raises(InputError, match="f: the.name holds 1 NaN or Inf values of 35"):
        check_finite("f", "the.name", tensor)
    write_safetensors(tmp_path / "w.safetensors", {"good": torch.ones(2), "the.name": tensor})
    with pytest.raises(InputError, match="the.name holds 1"):
        read_safetensors(tmp_path / "w.safetensors")


def test_inf_and_minus_inf():
    """Without it a check that only looks for an infinite sum could be fooled by infinities that
    cancel to NaN."""
    with pytest.raises(InputError, match="holds 2"):
        check_finite("f", "w", torch.tensor([float("inf"), 1.0, float("-inf")]))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((11,), 3e38),
        torch.full((11,), -3e38),
        torch.full((11,), 3e38, dtype=torch.bfloat16),
        torch.full((11,), 65504.0, dtype=torch.float16),
        torch.full((11,), 1e300, dtype=torch.float64),
        torch.zeros(0),
        torch.full((3,), 2**62),
    ],
)
def test_large_is_finite(tensor):
    """Without it weights whose sum overflows are refused though each of them is finite."""
    before = tensor.clone()
    assert check_finite("f", "w", tensor) is None and torch.equal(tensor, before)


# Writing ------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    """Without it what is saved comes back in another dtype or shape, or other readers can't open
    it."""
    path = tmp_path / "new" / "folder" / "w.safetensors"
    write_safetensors(path, TENSORS | {"turned": TENSORS["a"].T}, {"k": "2", "names": "a\nb"})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"format": "pt", "k": "2", "names": "a\nb"}
    for found in (tensors, load_file(path)):
        assert found.keys() == TENSORS.keys() | {"turned"}
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert torch.equal(found["turned"], TENSORS["a"].T)
    with open_safetensors(path) as file:
        assert torch.equal(file.get_tensor("b"), TENSORS["b"])


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Without it a recipe that is run again changes files of which nothing changed: the library's
    header has its metadata in the order of a hash with a random seed."""
    path = tmp_path / "w.safetensors"
    write_safetensors(path, TENSORS, {"zebra": "ä\n", "ant": "1", "mole": "2"})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0 and list(json.loads(data[8 : 8 + size])["__metadata__"]) == [
        "ant",
        "format",
        "mole",
        "zebra",
    ]
    assert read_safetensors(path)[1]["zebra"] == "ä\n"


def test_text_round_trips(tmp_path):
    """Without it umlauts, emoji or line ends change on their way through a file."""
    text = "naïve 🦊\r\n\t[INST] \\u0041"
    write_text(tmp_path / "a.txt", text)
    assert read_text(tmp_path / "a.txt") == text
    write_json(tmp_path / "a.json", {"a": [text, None, 1.5]})
    assert read_json(tmp_path / "a.json") == {"a": [text, None, 1.5]}
    assert "🦊" in (tmp_path / "a.json").read_text("utf-8")


class Broken(OSError):
    pass


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_old_file_stays(tmp_path, monkeypatch, where):
    """Without it a disk that fills up half-way through a save takes the earlier file with it."""

    def fail(*_):
        raise Broken(28, "No space left on device")

    path = tmp_path / "w.bin"
    write_bytes(path, b"old" * 1000)
    if where == "write":
        real = open

        def half_open(name, mode="r", **options):
            file = real(name, mode, **options)
            if "x" in mode:
                return HalfWriter(file)
            return file

        monkeypatch.setattr(files, "open", half_open, raising=False)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(InputError, match=f"{path}: No space left on device"):
        write_bytes(path, b"new!" * 1000)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["w.bin"]  # the half that was written would keep the disk full
    assert path.read_bytes() == b"old" * 1000
    write_bytes(path, b"newer")  # and what the failure left behind is in nobody's way
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["w.bin"]


class HalfWriter:
    """A file on a disk that is full after half of the first write."""

    def __init__(self, file):
        self.file = file
        self.name, self.fileno = file.name, file.fileno

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise Broken(28, "No space left on device")


def test_flushed_before_renamed(tmp_path, monkeypatch):
    """Without it a power cut after the rename can leave an empty file under the good name."""
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", Path(b).name)), replace(a, b)))
    write_bytes(tmp_path / "w", b"12345")
    assert calls[:2] == [("fsync", 5), ("replace", "w")]


def test_writers_of_one_file_do_not_meet(tmp_path):
    """With one partial file for all, a second writer empties the first one's or renames it away:
    files of two halves, and 'No such file' for who had written a whole one."""
    path, wrong = tmp_path / "w.bin", []

    def write(byte):
        try:
            for _ in range(25):
                write_bytes(path, bytes([byte]) * 70_001)
                found = path.read_bytes()
                if len(found) != 70_001 or len(set(found)) != 1:
                    wrong.append(found[:9])
        except InputError as error:
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(byte,)) for byte in range(5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert wrong == [] and os.listdir(tmp_path) == ["w.bin"]


def partial_of(path, digit):
    return path.with_name(f".{path.name}.{digit * 16}.partial")


def test_no_planted_link_is_followed(tmp_path, monkeypatch):
    """In a folder that others can write to, a link of the name that comes next would have us write
    over a file of ours that they can't reach."""
    path, target = tmp_path / "w.bin", tmp_path / "target"
    target.write_bytes(b"mine")
    partial_of(path, "7").symlink_to(target)
    monkeypatch.setattr(secrets, "token_hex", lambda n: "7" * 2 * n)
    with pytest.raises(InputError, match=f"{path}: File exists"):
        write_bytes(path, b"new")
    assert target.read_bytes() == b"mine" and partial_of(path, "7").is_symlink() and not path.exists()


def test_a_dead_writers_leftover_goes_and_no_other_file(tmp_path):
    """Each kill during a save would leave gigabytes for ever; and what a living writer holds, or
    what only looks alike, isn't ours to remove."""
    path = tmp_path / "w[1].bin"
    dead, alive, linked = (partial_of(path, digit) for digit in "abc")
    for partial in (dead, alive):
        partial.write_bytes(b"half")
    linked.symlink_to(tmp_path / "target")
    others = [
        ".w[1].bin.partial",
        ".w[1].bin.notes.partial",
        "w[1].bin.partial",
        ".w1.bin." + "a" * 16 + ".partial",
    ]
    for name in [*others, "target"]:
        (tmp_path / name).write_bytes(b"theirs")
    with open(alive, "rb+") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        write_bytes(path, b"whole")
        kept = {path.name, alive.name, linked.name, "target", *others}
        assert set(os.listdir(tmp_path)) == kept
    write_bytes(path, b"whole")  # its writer has died
    assert set(os.listdir(tmp_path)) == kept - {alive.name}


def test_a_partial_that_is_taken_before_it_is_locked(tmp_path, monkeypatch):
    """Between making a file and locking it a second writer may take it for a leftover: the first
    one's rename would then fail, and what it had written would be lost."""
    path, flock, turns = tmp_path / "w.bin", fcntl.flock, []

    def late(file, how):
        turns.append(how)
        if turns == [fcntl.LOCK_EX]:
            files._remove_leftovers(path)
            assert os.listdir(tmp_path) == []
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_bytes(path, b"whole")
    assert len(turns) == 3 and os.listdir(tmp_path) == ["w.bin"] and path.read_bytes() == b"whole"


# Hashes -------------------------------------------------------------------------------------------


def test_hash_ignores_order():
    """Without it the same adapter has another hash when its file lists the tensors in another
    order."""
    backwards = dict(reversed(TENSORS.items()))
    assert list(backwards) != list(TENSORS) and hash_tensors(TENSORS) == hash_tensors(backwards)
    turned = {"a": TENSORS["a"].T.contiguous().T}
    assert not turned["a"].is_contiguous() and hash_tensors(turned) == hash_tensors({"a": TENSORS["a"]})


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_hash_sees_every_byte(data):
    """Without it an adapter can change and gates trained for the old one still take it."""
    name = data.draw(st.sampled_from([n for n, t in TENSORS.items() if t.numel() and t.dtype != torch.bool]))
    raw = TENSORS[name].clone().view(-1).view(torch.uint8)
    index, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 7))
    raw[index] ^= 1 << bit
    changed = raw.view(TENSORS[name].dtype).view(TENSORS[name].shape)
    assert hash_tensors(TENSORS | {name: changed}) != hash_tensors(TENSORS)


def test_hash_sees_names_dtypes_and_shapes():
    """Without it the same bytes under another name, dtype or shape pass for the same adapter."""
    one, bits = TENSORS["a"], TENSORS["a"].view(torch.int32)
    variants = [
        {"a": one}, {"b": one}, {"a": bits}, {"a": one.view(7, 5)}, {"a": one.view(35)},
        {"a": one, "b": torch.zeros(0)}, {"a": one[:3], "b": one[3:]}, {"a": one[:2], "b": one[2:]}, {},
    ]  # fmt: skip
    hashes = [hash_tensors(v) for v in variants] + [
        hash_tensors({"a": one}, "scale 2"),
        hash_tensors({"a": one}, "scale 4"),
    ]
    assert len(set(hashes)) == len(hashes)


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    """Renaming over them would leave the file that the link names as it was, or replace a device by
    a file. A pipe that the user didn't name would be waited for."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "through", pipe=True)
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(InputError, match=f"{name}: is a pipe or a device, expected a file"):
            write_text(tmp_path / name, "through")


def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path):
    """Without it an answer would be generated and its picture then be lost. A file is written under
    a longer name first."""
    for n in (255, 240):
        with pytest.raises(InputError, match="can't be written: File name too long"):
            check_writable(tmp_path / ("a" * n))
        with pytest.raises(InputError, match="File name too long"):
            write_text(tmp_path / ("a" * n), "text")
    os.mkfifo(tmp_path / ("p" * 240))
    check_writable(tmp_path / ("p" * 240))  # into a pipe it is written at once
    (tmp_path / ("p" * 240)).unlink()
    check_writable(tmp_path / ("a" * 220))
    write_text(tmp_path / ("a" * 220), "text")
    assert [file.name for file in tmp_path.iterdir()] == ["a" * 220]
