"""The other programs that bench.py times: transformers, peft, llama-cpp-python.

They are optional, and timed where they are installed.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from common.files import InputError
from pool.adapters import Adapter, save_adapter
from tasks.folders import Batch

PEERS = ("transformers", "peft", "llama-cpp-python")
ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def repository_off_path() -> Iterator[None]:
    """sys.path without the repository, for importing transformers and peft.

    transformers looks for Hugging Face's package `kernels`, and would find kernels.py.
    """
    path = list(sys.path)
    kernels = sys.modules.pop("kernels", None)
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != ROOT]
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop("kernels", None)
        if kernels:
            sys.modules["kernels"] = kernels


def has(package: str) -> bool:
    """Whether `package` is installed."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def hf_llama(folder: Path | str, dtype: torch.dtype) -> torch.nn.Module:
    """transformers' Llama."""
    with repository_off_path():
        from transformers import AutoModelForCausalLM
        from transformers.models.llama import modeling_llama  # noqa: F401 (else imported later)

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def peft_llama(folder: Path | str, dtype: torch.dtype, adapters: list[Adapter]) -> torch.nn.Module:
    """peft's Llama with the Adapters in it, which it reads from files."""
    with repository_off_path():
        from peft import PeftModel

    with tempfile.TemporaryDirectory() as temporary:
        model = hf_llama(folder, dtype)
        for adapter in adapters:
            path = Path(temporary) / adapter.name
            name = adapter.name
            save_adapter(adapter, path)
            if adapter is adapters[0]:
                model = PeftModel.from_pretrained(model, path, name, autocast_adapter_dtype=False)
            else:
                model.load_adapter(path, name, autocast_adapter_dtype=False)
    return model.eval()


class HfDecoder:
    """timed.Decoder for a model and a cache of transformers; `options` go to the model's forward.

    Each call decodes `tokens` for each row, starting after the prompts `ids` (b, t).
    """

    def __init__(self, model: torch.nn.Module, ids: torch.Tensor, tokens: int = 0, **options):
        self.model = model
        self.ids = ids
        self.tokens = tokens
        self.options = options
        self.out = self.prefill()

    @torch.inference_mode()
    def prefill(self) -> dict:
        """Reads the prompts into a new cache; returns transformers' output."""
        return self.model(self.ids, use_cache=True, logits_to_keep=1, **self.options)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        cache = self.out.past_key_values
        ids = self.out.logits[:, -1:].float().argmax(-1)
        if beyond := cache.get_seq_length() - self.ids.shape[1]:
            cache.crop(-beyond)
        for _ in range(self.tokens):
            logits = self.model(ids, past_key_values=cache, use_cache=True, **self.options).logits
            ids = logits[:, -1:].float().argmax(-1)
        return ids


class LlamaCpp:
    """timed.Decoder for llama.cpp, starting after the prompt `ids` (1, t)."""

    def __init__(self, file: Path | str, ids: torch.Tensor, tokens: int = 0):
        from llama_cpp import Llama as Program

        threads = torch.get_num_threads()
        self.ids = ids[0].tolist()
        self.tokens = tokens
        try:
            sizes = {"n_ctx": len(self.ids) + tokens + 8, "n_batch": 512, "n_ubatch": 512}
            cores = {"n_threads": threads, "n_threads_batch": threads}
            self.program = Program(str(file), **sizes, **cores, verbose=False)
        except ValueError as error:
            raise InputError(f"--gguf: {error}") from None
        self.prefill()

    def prefill(self) -> None:
        """Reads the prompt into an empty cache."""
        self.program.reset()
        self.program.eval(self.ids)

    def __call__(self) -> None:
        self.program.n_tokens = len(self.ids)
        v = self.program.n_vocab()
        for _ in range(self.tokens):
            logits = np.ctypeslib.as_array(self.program._ctx.get_logits(), shape=(v,))
            self.program.eval([int(logits.argmax())])


def check_gguf(file: str, device: str) -> None:
    """Raises InputError where llama.cpp can't be timed."""
    if not Path(file).is_file():
        raise InputError(f"--gguf: {file}: no such file")
    if not has("llama-cpp-python"):
        raise InputError("--gguf needs a package that is not here: pip install llama-cpp-python")
    if device != "cpu":
        raise InputError(f"--gguf: llama.cpp is timed on the CPU, and --device is {device}")


def peft_trainer(
    folder: Path | str, dtype: torch.dtype, r: int, targets: set[str], device: str
) -> tuple[list[torch.nn.Parameter], Callable[[Batch], None]]:
    """(parameters, step) of one adapter of rank r on the Linears `targets`.

    step(batch) is the forward and backward. It has no mask: padding at the end doesn't need one,
    and with one it would be slower.
    """
    with repository_off_path():
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(targets))
    model = get_peft_model(hf_llama(folder, dtype), config).to(device).train()

    def step(batch):
        labels = batch.ids.masked_fill(~batch.predicts.roll(1, 1), -100)
        model(batch.ids, labels=labels).loss.backward()

    return [p for p in model.parameters() if p.requires_grad], step
