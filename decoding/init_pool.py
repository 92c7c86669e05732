"""`generate.py --init`: PEFT folders become a pool that needs no training to choose among them.

POOL gets what its folders don't say: pool.json (base and template), for each adapter a
samples.jsonl, the prompts by which it is found, and retriever.safetensors, their vectors. Samples
come from the user, from tasks or, for want of both, from the model itself, which writes prompts
with the adapter.
"""

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from common.files import InputError, read_jsonl, read_text
from common.options import nearest
from common.progress import track
from common.template import CHAT, fill
from common.tensors import read_metadata
from common.tokenizer import Tokenizer
from decoding.loop import decode
from decoding.sampling import Sampling
from methods.batch import set_methods
from methods.session import Mole, retriever_of
from pool.adapters import adapter_files, save_samples
from pool.folder import PoolFolder, is_folder_name, write_pool
from pool.retriever import LlamaEncoder, Retriever, save_retriever

MARK = "\ufffc"  # stands where the prompt would be


def read_samples(pairs: Iterable[str], adapters: Collection[str]) -> dict[str, list[str]]:
    """["NAME=FILE", ...] -> {adapter: prompts}. A FILE.jsonl has {"prompt"} a line, any other file a
    prompt a line. Raises InputError, also for a name that is none of the `adapters`."""
    found = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if not (name and file):
            raise InputError(f"--samples is {pair!r}, expected NAME=FILE")
        if name in found:
            raise InputError(f"--samples: adapter {name} twice")
        if name not in adapters:
            raise InputError(f"--samples: no adapter {name!r}{nearest(name, adapters)}")
        if file.endswith(".jsonl"):
            prompts = [row["prompt"] for row in read_jsonl(file, ("prompt",), pipe=True)]
        else:
            prompts = list(filter(None, map(str.strip, read_text(file, pipe=True).split("\n"))))
        if not prompts:
            raise InputError(f"{file}: holds no prompt")
        found[name] = prompts
    return found


def init_pool(mole: Mole, given: dict[str, list[str]], write: int = 0, seed: int = 0) -> None:
    """Writes into the pool's folder what it lacks: adapters that lie elsewhere, samples of each
    adapter, the vectors of the samples, and pool.json. Samples are those `given` {adapter:
    prompts}, else those that the adapter has, else `write` of them, written by the model."""
    folder = mole.folder
    folder.adapters = _copy_into(folder)
    adapters = {name: mole.pool.members[name].adapter for name in mole.pool.names}
    for name, prompts in given.items():
        adapters[name].samples = prompts
    lacking = [name for name, adapter in adapters.items() if not adapter.samples]
    for name in track(lacking if write else [], "writing samples"):
        adapters[name].samples = write_samples(mole, name, write, seed)
    for name, adapter in adapters.items():
        if adapter.samples:
            save_samples(folder.adapters[name], adapter.samples)
    folder.fingerprint = mole.model.fingerprint()
    folder.template = mole.template
    write_pool(folder)
    if write or len(lacking) < len(adapters):
        file = folder.path / "retriever.safetensors"  # a trained one stays, with the new vectors
        tasks = read_metadata(file).get("tasks", "") if file.exists() else ""
        if not file.exists():
            mole.retriever = Retriever(LlamaEncoder(mole.model, mole.tokenizer))
        save_retriever(file, retriever_of(mole), mole.model, {"tasks": tasks})


def _copy_into(folder: PoolFolder) -> dict[str, Path]:
    """{adapter: its folder within the pool}: adapters that lie elsewhere are copied, beside the
    others or, into a new pool, into adapters/."""
    is_plain = any(path.parent == folder.path for path in folder.adapters.values())
    inside = folder.path if is_plain else folder.path / "adapters"
    found = {}
    for name, path in folder.adapters.items():
        if not is_folder_name(name):
            expected = "no slashes, and no dot at the beginning, as it gets a folder"
            raise InputError(f"--init: adapter name is {name!r}, expected {expected}")
        found[name] = path
        if path.parent != inside:
            found[name] = inside / name
            found[name].mkdir(parents=True, exist_ok=True)
            for file in adapter_files(path):
                shutil.copyfile(file, found[name] / file.name)
    return found


def write_samples(mole: Mole, name: str, count: int, seed: int = 0) -> list[str]:
    """`count` prompts as the model with the adapter `name` writes them: the template up to where a
    prompt stands is continued by sampling."""
    head, tail = around_prompt(mole.tokenizer, mole.template)
    ids = mole.tokenizer.encode(head, start=mole.template != CHAT)
    if not ids:
        raise InputError("--write_samples: nothing comes before a prompt, no template and no BOS token")
    set_methods(mole, [f"adapter:{name}"] * count)
    sampling = Sampling(max_new_tokens=48, temperature=1.0, top_p=0.9, seed=seed)
    stops = [[tail.strip()] if tail.strip() else ["\n\n"]] * count
    texts = [""] * count
    for token in decode(mole, [ids] * count, sampling, stops=stops):
        texts[token.row] += token.text
    return list(filter(None, map(str.strip, texts)))


def around_prompt(tokenizer: Tokenizer, template: str) -> tuple[str, str]:
    """The texts before and after a prompt."""
    asked = [{"role": "user", "content": MARK}]
    wrapped = tokenizer.chat(asked) if template == CHAT else fill(template, MARK)
    head, _, tail = wrapped.partition(MARK)
    return head, tail
