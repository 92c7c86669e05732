"""The other programs that bench.py times where they are installed: transformers, peft,
llama-cpp-python."""

import contextlib
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from common.files import InputError
from pool.adapters import save_adapter

PEERS = ("transformers", "peft", "llama-cpp-python")


ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def repository_off_path():
    """sys.path without the repository, for importing transformers and peft: transformers looks for
    Hugging Face's package `kernels`, and would find kernels.py."""
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


def has(package):
    """Whether `package` is installed."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def hf_llama(folder, dtype):
    """transformers' Llama."""
    with repository_off_path():
        from transformers import AutoModelForCausalLM
        from transformers.models.llama import modeling_llama  # noqa: F401 (else imported when it is needed)

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def peft_llama(folder, dtype, adapters):
    """The same with adapters.Adapter's in it, through the files that peft reads."""
    with repository_off_path():
        from peft import PeftModel

    with tempfile.TemporaryDirectory() as temporary:
        paths = {adapter.name: Path(temporary) / adapter.name for adapter in adapters}
        for adapter in adapters:
            save_adapter(adapter, paths[adapter.name])
        first, *others = paths
        model = PeftModel.from_pretrained(
            hf_llama(folder, dtype), paths[first], first, autocast_adapter_dtype=False
        )
        for name in others:
            model.load_adapter(paths[name], name, autocast_adapter_dtype=False)
    return model.eval()


class HfDecoder:
    """bench.Decoder with a model and a cache of transformers: goes on from ids (b, t), `tokens` for
    each row; `options` go to the model."""

    def __init__(self, model, ids, tokens=0, **options):
        self.model = model
        self.ids = ids
        self.tokens = tokens
        self.options = options
        self.out = self.prefill()

    @torch.inference_mode()
    def prefill(self):
        """Reads the prompts into a new cache."""
        return self.model(self.ids, use_cache=True, logits_to_keep=1, **self.options)

    @torch.inference_mode()
    def __call__(self):
        cache = self.out.past_key_values
        ids = self.out.logits[:, -1:].float().argmax(-1)
        if beyond := cache.get_seq_length() - self.ids.shape[1]:
            cache.crop(-beyond)
        for _ in range(self.tokens):
            logits = self.model(ids, past_key_values=cache, use_cache=True, **self.options).logits
            ids = logits[:, -1:].float().argmax(-1)
        return ids


class LlamaCpp:
    """bench.Decoder with llama.cpp: goes on from ids (1, t)."""

    def __init__(self, file, ids, tokens=0):
        from llama_cpp import Llama as Program

        threads = torch.get_num_threads()
        self.ids = ids[0].tolist()
        self.tokens = tokens
        try:
            self.program = Program(str(file), n_ctx=len(self.ids) + tokens + 8, n_batch=512, n_ubatch=512,
                                   n_threads=threads, n_threads_batch=threads, verbose=False)  # fmt: skip
        except ValueError as error:
            raise InputError(f"--gguf: {error}") from None
        self.prefill()

    def prefill(self):
        """Reads the prompt into an empty cache."""
        self.program.reset()
        self.program.eval(self.ids)

    def __call__(self):
        self.program.n_tokens = len(self.ids)
        for _ in range(self.tokens):
            logits = np.ctypeslib.as_array(self.program._ctx.get_logits(), shape=(self.program.n_vocab(),))
            self.program.eval([int(logits.argmax())])


def peft_trainer(folder, dtype, r, targets, device):
    """(parameters, step): forward and backward of one adapter of rank r on the Linears `targets`,
    of a tasks.Batch. No mask, which padding at the end does not need, and which takes longer."""
    with repository_off_path():
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(targets))
    model = get_peft_model(hf_llama(folder, dtype), config).to(device).train()

    def step(batch):
        labels = batch.ids.masked_fill(~batch.predicts.roll(1, 1), -100)
        model(batch.ids, labels=labels).loss.backward()

    return [p for p in model.parameters() if p.requires_grad], step
