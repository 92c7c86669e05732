"""Sizes that no memory holds are refused before anything is allocated, with both figures."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from common import devices
from common.devices import check_memory, memory_of
from common.files import InputError
from helpers_models import random_adapter
from model import load_llama
from pool.adapters import linear_shapes
from pool.slots import Pool
from train import BaseRun, check_sizes


def test_the_machines_memory():
    """Without it every size fits, or none."""
    total = 1024 * int(re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert memory_of("cpu") == memory_of("meta") == total
    check_memory("x", memory_of("cpu"))
    with pytest.raises(InputError, match=r"^x need [\d,.]+ GiB of memory, this machine has [\d,.]+$"):
        check_memory("x", memory_of("cpu") + 1)


def test_a_gpus_memory(monkeypatch):
    """Without it the line gives a GPU's memory as the machine's."""
    monkeypatch.setattr(devices, "memory_of", lambda device: 2**30 if device.type == "cuda" else 2**40)
    check_memory("x", 2**40)
    with pytest.raises(InputError, match=r"^x need 5.0 GiB of memory, this GPU has 1.0$"):
        check_memory("x", 5 * 2**30, "cuda:0")


def edited(tmp_path, small_model, **fields):
    folder = shutil.copytree(small_model, tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 1_000_000, "head_dim": 1_000_000, "num_attention_heads": 4},
        {"num_hidden_layers": 1_000, "intermediate_size": 10_000_000},
        {"vocab_size": 10_000_000, "hidden_size": 1_000_000},
    ],
)
def test_a_model_that_fits_no_machine(tmp_path, small_model, fields):
    """Without it torch counts elements beyond 64 bits, or the machine swaps for minutes."""
    folder = edited(tmp_path, small_model, **fields)
    with pytest.raises(
        InputError, match=r"config.json: its sizes need [\d,.]+ GiB of memory, this machine has"
    ):
        load_llama(folder)


@pytest.mark.parametrize("layers", [1_001, 10**6, 10**30])
def test_layers(tmp_path, small_model, layers):
    """Without it a million layers are made, one after another, for minutes."""
    with pytest.raises(
        InputError, match=f"num_hidden_layers is {layers}, expected a whole number from 1 to 1,000"
    ):
        load_llama(edited(tmp_path, small_model, num_hidden_layers=layers))


def test_what_a_model_and_a_pool_need(small_model, monkeypatch):
    """Without it the figure isn't that of the tensors: a byte less is refused, the same isn't."""
    model = load_llama(small_model)
    size = sum(p.numel() for p in model.parameters()) * 2  # before the file says its dtype: at least so many
    monkeypatch.setattr(devices, "memory_of", lambda device: size)
    load_llama(small_model)
    monkeypatch.setattr(devices, "memory_of", lambda device: size - 1)
    with pytest.raises(InputError, match="its sizes need"):
        load_llama(small_model)
    shapes = linear_shapes(model)
    adapters = [random_adapter(name, shapes, 3, seed=7) for name in "ab"]
    size = sum(part.nbytes for adapter in adapters for part in adapter.tensors().values())
    monkeypatch.setattr(devices, "memory_of", lambda device: size)
    pool = Pool.of(adapters, shapes, torch.float32)
    assert size == sum(part.nbytes for part in [*pool.A.values(), *pool.B.values()])
    monkeypatch.setattr(devices, "memory_of", lambda device: size - 1)
    with pytest.raises(InputError, match="2 adapters of rank 3 need"):
        Pool.of(adapters, shapes, torch.float32)


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 960_000}, {"num_hidden_layers": 1_000, "intermediate_size": 1_000_000}]
)
def test_a_base_that_fits_no_machine(sizes):
    """Without it `train.py base` allocates until the kernel kills it."""
    args = BaseRun(model="m", device="cpu")
    check_sizes(args)
    named = re.escape(f"--hidden_size {sizes.get('hidden_size', args.hidden_size)} and the other sizes")
    with pytest.raises(InputError, match=rf"{named}: .* need [\d,.]+ GiB of memory, this machine has"):
        check_sizes(dataclasses.replace(args, **sizes))
