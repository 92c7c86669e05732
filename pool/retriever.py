"""LoraRetriever (arXiv 2402.09997) finds the adapters whose training prompts are like a prompt.

    E(phi) = mean of E(I + x) over the samples x of adapter phi
    score(prompt, phi) = cos(E(I + prompt), E(phi))

The k adapters of the highest scores are retrieved. A new adapter needs samples, but no training.
E may be any function of a list of texts to vectors (n, d). By default it averages the base's
hidden states over the text's tokens and projects them by a small trained matrix (train.py
retriever); it may also be a sentence-transformers folder.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.fields import Number, parse_number
from common.files import InputError, warn
from common.options import COUNT
from common.progress import progress, track
from common.tensors import cast_finite, read_safetensors, write_safetensors
from common.tokenizer import Tokenizer
from model import Llama
from moe_lora import swap
from pool.folder import check_base, check_twice

INSTRUCTION = "Represent the sentence for similar task retrieval: "  # the paper's I


@contextlib.contextmanager
def base_alone(model: Llama) -> Iterator[Llama]:
    """Within it the model has its plain Linears; afterwards the wrapped Linears are back."""
    swapped = []
    for path, module in list(model.named_modules()):
        if isinstance(getattr(module, "base", None), nn.Linear):
            swapped.append((path, module))
            swap(model, path, module.base)
    try:
        yield model
    finally:
        for path, module in swapped:
            swap(model, path, module)


def strip_shared(prompts: list[str], lines: float = 0.05, pairs: float = 0.3) -> list[str]:
    """Removes from the prompts of one task what they share ("Translate into German:", "Q: ... A:").

    A line goes where at least a share `lines` of the prompts has it, a pair of neighbouring words
    where at least a share `pairs` has it. Of a prompt that would be empty the last word stays.
    """
    n = len(prompts)
    lines_of = [list(map(str.strip, prompt.split("\n"))) for prompt in prompts]
    count = _count_prompts(lines_of)
    words_of = []
    for row in lines_of:
        rare = [line for line in row if line and count[line] < max(2, lines * n)]
        words_of.append(" \n ".join(rare).split(" "))
    count = _count_prompts(map(pairwise, words_of))
    stripped = []
    for words, prompt in zip(words_of, prompts, strict=True):
        shared = set()
        for j, pair in enumerate(pairwise(words)):
            if count[pair] >= max(2, pairs * n):
                shared |= {j, j + 1}
        text = " ".join(word for j, word in enumerate(words) if j not in shared)
        text = re.sub(r"\s*\n\s*", "\n", text).strip()
        stripped.append(text or (prompt.split() or [""])[-1])
    return stripped


def _count_prompts(prompts):
    """[the lines or pairs of words of a prompt] -> {line or pair: how many prompts have it}."""
    count = Counter()
    for found in prompts:
        count.update(set(found))
    return count


class LlamaEncoder:
    """Texts -> unit vectors (n, d).

    The base's hidden states after block `depth` (default: two thirds of the way up, where they tell
    tasks apart best: LOG.md) are averaged over the text's tokens, without those of the instruction,
    and normalised; then `mean` (h,) is subtracted and `projection` (d, h) applied.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        depth: int | None = None,
        mean: torch.Tensor | None = None,
        projection: torch.Tensor | None = None,
        max_length: int = 256,
    ):
        depth = depth or max(1, model.config.num_hidden_layers * 2 // 3)
        h = model.config.hidden_size
        max_length = min(max_length, model.config.context)
        self.model = model
        self.tokenizer = tokenizer
        self.depth = depth
        self.max_length = max_length
        self.mean = torch.zeros(h) if mean is None else mean
        self.projection = torch.eye(h) if projection is None else projection

    @torch.inference_mode()
    def pooled(self, texts: list[str], tokens: int = 4096) -> torch.Tensor:
        """The averages (n, h) float32; one forward has at most `tokens` tokens, or one text."""
        model = self.model
        head = self.tokenizer.encode(INSTRUCTION)
        room = max(1, self.max_length - len(head))
        rows = [self.tokenizer.encode(text, start=False)[:room] for text in texts]
        rows = [row or head[-1:] for row in rows]  # of an empty text: the instruction's last token
        out = torch.empty(len(rows), model.config.hidden_size)
        device = model.head_weight.device
        order = sorted(range(len(rows)), key=lambda j: len(rows[j]))
        with base_alone(model), progress("texts embedded", len(rows)) as bar:
            while order:
                longest = len(rows[order[-1]]) + len(head)
                some = order[-max(1, tokens // longest) :]
                order = order[: -max(1, tokens // longest)]
                ids = torch.zeros(len(some), longest, dtype=torch.int64)
                mask = torch.zeros(len(some), longest, dtype=torch.bool)
                for j, row in enumerate(some):
                    end = len(head) + len(rows[row])
                    ids[j, :end] = torch.tensor(head + rows[row])
                    mask[j, len(head) : end] = True
                hidden = model.model(ids.to(device), depth=self.depth).float().cpu()
                total = hidden.masked_fill(~mask[..., None], 0).sum(1)
                out[some] = total / mask.sum(1, keepdim=True)
                bar.update(len(some))
        return out

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """(n, h) -> unit vectors (n, d)."""
        centred = F.normalize(pooled, dim=-1) - self.mean
        return F.normalize(F.linear(centred, self.projection), dim=-1)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.project(self.pooled(texts))


def sentence_encoder(folder: Path | str) -> Callable[[list[str]], torch.Tensor]:
    """A sentence-transformers folder -> the `embed` of a Retriever. Raises InputError where the
    package or the folder is missing."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of a sentence-transformers model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        missing = "--encoder needs a package that is not here"
        raise InputError(f"{missing}: pip install sentence-transformers") from None
    encoder = SentenceTransformer(str(folder), device="cpu")

    def embed(texts):
        texts = [INSTRUCTION + text for text in texts]
        return encoder.encode(texts, convert_to_tensor=True).float()

    return embed


class Retriever:
    """Ranks adapters for a prompt; `embed` is a function of a list of texts to vectors (n, d)."""

    def __init__(self, embed: Callable[[list[str]], torch.Tensor]):
        self.embed = embed
        self.vectors = {}  # name -> (d,)
        self.digests = {}  # name -> sha256 of its samples

    def add(self, name: str, samples: list[str]) -> None:
        """Adds an adapter by the mean vector of its samples, which is computed only where they
        have changed. Warns where there are no samples: then it can't be retrieved."""
        digest = hashlib.sha256("\0".join(samples).encode()).hexdigest()
        if self.digests.get(name) == digest:
            return
        self.remove(name)
        if not samples:
            warn(f"adapter {name}: no samples.jsonl, so it can't be retrieved")
            return
        self.vectors[name] = F.normalize(self.embed(samples), dim=-1).mean(0)
        self.digests[name] = digest

    def remove(self, name: str) -> None:
        """Forgets an adapter."""
        self.vectors.pop(name, None)
        self.digests.pop(name, None)

    def keep(self, members: dict[str, list[str]]) -> None:
        """Adds and removes adapters until they are exactly {name: samples}."""
        for name in self.vectors.keys() - members.keys():
            self.remove(name)
        for name, samples in track(members.items(), "adapters' samples embedded"):
            self.add(name, samples)

    def __call__(
        self, prompts: Collection[str], k: int, exclude: Collection[str] = ()
    ) -> list[list[tuple[str, float]]]:
        """For each prompt the k best [(name, score), ...], the best first. Raises InputError where
        there is none."""
        return self.nearest(self.embed(list(prompts)), k, exclude)

    def nearest(
        self, vectors: torch.Tensor, k: int, exclude: Collection[str] = ()
    ) -> list[list[tuple[str, float]]]:
        """The same for vectors (n, d) of prompts."""
        names = sorted(self.vectors.keys() - set(exclude))
        if not names:
            why = "every adapter is excluded or has no samples.jsonl"
            raise InputError(f"nothing to retrieve: {why}")
        adapters = F.normalize(torch.stack([self.vectors[name] for name in names]), dim=-1)
        top = (F.normalize(vectors, dim=-1) @ adapters.T).topk(min(k, len(names)), dim=-1)
        found = []
        for scores, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            best = map(names.__getitem__, indices)
            found.append([(name, round(s, 6)) for name, s in zip(best, scores, strict=True)])
        return found


def save_retriever(file: Path | str, retriever: Retriever, model: Llama, about: dict[str, str]) -> None:
    """Writes the encoder's tensors and one vector an adapter, bound to the base and to the
    adapters' samples. `about` says how it was trained."""
    names = sorted(retriever.vectors)
    encoder = retriever.embed
    vectors = [retriever.vectors[name][None] for name in names]  # (1, d) each
    none = encoder.projection.new_zeros(0, len(encoder.projection))  # (0, d)
    tensors = {
        "encoder.mean": encoder.mean,
        "encoder.projection": encoder.projection,
        "adapters": torch.cat([none, *vectors]),
    }
    metadata = {
        "names": "\n".join(names),
        "hashes": "\n".join(map(retriever.digests.get, names)),
        "base": model.fingerprint(),
        "depth": str(encoder.depth),
        "max_length": str(encoder.max_length),
    }
    write_safetensors(file, tensors, metadata | about)


def load_retriever(file: Path | str, model: Llama, tokenizer: Tokenizer) -> tuple[Retriever, dict[str, str]]:
    """File -> (Retriever, metadata). Raises InputError where the file isn't one of save_retriever
    or was trained with another base."""
    tensors, metadata = read_safetensors(file)
    tensors = {name: cast_finite(file, name, y, torch.float32) for name, y in tensors.items()}
    lacks = {"names", "hashes", "base", "depth", "max_length"} - metadata.keys()
    lacks |= {"encoder.mean", "encoder.projection", "adapters"} - tensors.keys()
    if lacks:
        missing = ", ".join(sorted(lacks))
        raise InputError(f"{file}: lacks {missing}: not a retriever of this project")
    again = "python train.py retriever trains it again"
    check_base(file, metadata["base"], model.fingerprint(), again)
    mean = tensors["encoder.mean"]
    projection = tensors["encoder.projection"]
    h = model.config.hidden_size
    rows = projection.shape[0] if projection.dim() == 2 else 0
    if not rows or tuple(projection.shape) != (rows, h) or tuple(mean.shape) != (h,):
        raise InputError(
            f"{file}: encoder.projection is {tuple(projection.shape)}, encoder.mean "
            f"{tuple(mean.shape)}; expected (d, {h}) with d above 0, and ({h},)"
        )
    layers = model.config.num_hidden_layers
    depth = parse_number(f"{file}: depth", metadata["depth"], Number(int, 1, layers))
    max_length = parse_number(f"{file}: max_length", metadata["max_length"], COUNT)
    retriever = Retriever(LlamaEncoder(model, tokenizer, depth, mean, projection, max_length))
    names = metadata["names"].split("\n") if metadata["names"] else []
    hashes = metadata["hashes"].split("\n") if metadata["hashes"] else []
    check_twice(file, names)
    vectors = tensors["adapters"]
    if not len(names) == len(hashes) == len(vectors):
        found = f"{len(names)} names, {len(hashes)} hashes, {len(vectors)} vectors"
        raise InputError(f"{file}: {found}; expected as many of each: {again}")
    if vectors.shape[1:] != projection.shape[:1]:
        found = f"adapters is {tuple(vectors.shape)}"
        raise InputError(f"{file}: {found}, expected {(len(names), len(projection))}: {again}")
    retriever.vectors = dict(zip(names, vectors, strict=True))
    retriever.digests = dict(zip(names, hashes, strict=True))
    return retriever, metadata
