"""LoraRetriever (arXiv 2402.09997): the adapters of a pool that suit a prompt, found by prompts
that they learnt from.

    E(phi) = mean over the adapter's samples x of E(I + x),    score(prompt, phi) = cos(E(I + prompt), E(phi))

The k best scores are retrieved. An adapter joins by its samples, without training. E may be any
function of a list of texts to vectors (n, d): by default the base's own hidden states, averaged
over the text's tokens and projected by a small trained matrix (train.py retriever), or a
sentence-transformers folder.
"""

import contextlib
import hashlib
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.files import InputError, read_safetensors, warn, write_safetensors
from moe_lora import swap

INSTRUCTION = "Represent the sentence for similar task retrieval: "  # I, the paper's


@contextlib.contextmanager
def base_alone(model):
    """The base inside, without whatever wraps its Linears; afterwards all is as it was."""
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


def strip_shared(prompts, lines=0.05, pairs=0.3):
    """What is each prompt's own of the prompts of one task: without lines that a share `lines` of
    them has, and without pairs of words that a share `pairs` has ("Translate into German:", "Q:"
    ... "A:"). What would be empty is the last word."""
    n = len(prompts)
    rows = [[line.strip() for line in prompt.split("\n")] for prompt in prompts]
    often = Counter(line for row in rows for line in set(row))
    rows = [
        " \n ".join(line for line in row if line and often[line] < max(2, lines * n)).split(" ")
        for row in rows
    ]
    often = Counter(pair for row in rows for pair in set(pairwise(row)))
    out = []
    for row, prompt in zip(rows, prompts, strict=True):
        shared = {
            j + d for j, pair in enumerate(pairwise(row)) if often[pair] >= max(2, pairs * n) for d in (0, 1)
        }
        text = " ".join(word for j, word in enumerate(row) if j not in shared)
        out.append(re.sub(r"\s*\n\s*", "\n", text).strip() or (prompt.split() or [""])[-1])
    return out


class LlamaEncoder:
    """Texts -> unit vectors (n, d): the base's hidden states behind block `depth` (default: the
    last), averaged over the text's own tokens (not the instruction's before them), normalised, less
    `mean` (h,), times `projection` (d, h).
    """

    def __init__(self, model, tokenizer, depth=None, mean=None, projection=None, max_length=256):
        depth = model.config.num_hidden_layers if depth is None else depth
        h = model.config.hidden_size
        max_length = min(max_length, model.config.max_position_embeddings)
        self.model = model
        self.tokenizer = tokenizer
        self.depth = depth
        self.max_length = max_length
        self.mean = torch.zeros(h) if mean is None else mean
        self.projection = torch.eye(h) if projection is None else projection

    @torch.inference_mode()
    def pooled(self, texts, tokens=4096):
        """(n, h) float32: what the projection is applied to; `tokens` at most in one forward."""
        model = self.model
        head = self.tokenizer.encode(INSTRUCTION)
        room = max(1, self.max_length - len(head))
        rows = [self.tokenizer.encode(text, start=False)[:room] for text in texts]
        rows = [row or head[-1:] for row in rows]  # an empty text is the end of the instruction
        out = torch.empty(len(rows), model.config.hidden_size)
        order = sorted(range(len(rows)), key=lambda j: len(rows[j]))
        with base_alone(model):
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
                hidden = model.model(ids.to(model.head_weight.device), depth=self.depth).float().cpu()
                out[some] = hidden.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
        return out

    def project(self, pooled):
        """(n, h) -> unit vectors (n, d)."""
        return F.normalize(F.linear(F.normalize(pooled, dim=-1) - self.mean, self.projection), dim=-1)

    def __call__(self, texts):
        return self.project(self.pooled(texts))


def sentence_encoder(folder):
    """embed() of a sentence-transformers folder. Raises InputError where the package or the folder
    is missing."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of a sentence-transformers model")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError(
            "--encoder needs a package that is not here: pip install sentence-transformers"
        ) from None
    encoder = SentenceTransformer(str(folder), device="cpu")
    return lambda texts: encoder.encode(
        [INSTRUCTION + text for text in texts], convert_to_tensor=True
    ).float()


class Retriever:
    """Ranks the adapters it was given by `embed`, a function of a list of texts to vectors (n, d)."""

    def __init__(self, embed):
        self.embed = embed
        self.vectors = {}  # name -> (d,)
        self.digests = {}  # name -> sha256 of its samples

    def add(self, name, samples):
        """An adapter by its samples: their mean vector. One that is known by these samples costs
        nothing. Without samples it can't be retrieved: one warning."""
        digest = hashlib.sha256("\0".join(samples).encode()).hexdigest()
        if self.digests.get(name) == digest:
            return
        self.remove(name)
        if not samples:
            warn(f"adapter {name}: no samples.jsonl, so it can't be retrieved")
            return
        self.vectors[name] = F.normalize(self.embed(samples), dim=-1).mean(0)
        self.digests[name] = digest

    def remove(self, name):
        """Forgets an adapter."""
        self.vectors.pop(name, None), self.digests.pop(name, None)

    def keep(self, members):
        """Knows from now on exactly the adapters {name: samples}."""
        for name in self.vectors.keys() - members.keys():
            self.remove(name)
        for name, samples in members.items():
            self.add(name, samples)

    def __call__(self, prompts, k, exclude=()):
        """For each prompt the k best [(name, score), ...], the best first. Raises InputError where
        there is none."""
        return self.nearest(self.embed(list(prompts)), k, exclude)

    def nearest(self, vectors, k, exclude=()):
        """The same for vectors (n, d) of prompts."""
        names = sorted(self.vectors.keys() - set(exclude))
        if not names:
            raise InputError("nothing to retrieve: every adapter is excluded or has no samples.jsonl")
        known = F.normalize(torch.stack([self.vectors[name] for name in names]), dim=-1)
        top = (F.normalize(vectors, dim=-1) @ known.T).topk(min(k, len(names)), dim=-1)
        return [
            [(names[j], round(s, 6)) for s, j in zip(*row, strict=True)]
            for row in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]


def save_retriever(file, retriever, model, about):
    """POOL/retriever.safetensors: the encoder's tensors and one vector an adapter, bound to the
    base and to the adapters' samples. `about` {key: text}: how it was trained."""
    names = sorted(retriever.vectors)
    encoder = retriever.embed
    tensors = {"encoder.mean": encoder.mean, "encoder.projection": encoder.projection}
    tensors["adapters"] = torch.stack(
        [retriever.vectors[name] for name in names] or [encoder.mean.new_zeros(0)]
    )
    hashes = [retriever.digests[name] for name in names]
    write_safetensors(file, tensors, {
        "names": "\n".join(names), "hashes": "\n".join(hashes), "base": model.fingerprint, "depth": str(encoder.depth),
        "max_length": str(encoder.max_length), **about,
    })  # fmt: skip


def load_retriever(file, model, tokenizer):
    """File -> (Retriever, metadata). Raises InputError where it was made for another base, or isn't
    one of ours."""
    tensors, metadata = read_safetensors(file)
    lacks = {"names", "hashes", "base", "depth", "max_length"} - metadata.keys()
    lacks |= {"encoder.mean", "encoder.projection", "adapters"} - tensors.keys()
    if lacks:
        raise InputError(f"{file}: lacks {', '.join(sorted(lacks))}: not a retriever of this project")
    if metadata["base"] != model.fingerprint:
        raise InputError(f"{file}: made for base {metadata['base'][:12]}, this one is {model.fingerprint[:12]}: "
                         "python train.py retriever makes one for it")  # fmt: skip
    mean = tensors["encoder.mean"].float()
    projection = tensors["encoder.projection"].float()
    if projection.dim() != 2 or mean.shape != projection.shape[1:] or len(mean) != model.config.hidden_size:
        raise InputError(f"{file}: encoder.projection is {tuple(projection.shape)}, encoder.mean {tuple(mean.shape)}; "
                         f"expected (d, {model.config.hidden_size}) and ({model.config.hidden_size},)")  # fmt: skip
    encoder = LlamaEncoder(
        model, tokenizer, int(metadata["depth"]), mean, projection, int(metadata["max_length"])
    )
    retriever = Retriever(encoder)
    names, hashes = (metadata[key].split("\n") if metadata[key] else [] for key in ("names", "hashes"))
    if not len(names) == len(hashes) == len(tensors["adapters"]):
        raise InputError(f"{file}: {len(names)} names, {len(hashes)} hashes, {len(tensors['adapters'])} vectors; "
                         "expected as many of each")  # fmt: skip
    retriever.vectors = dict(zip(names, tensors["adapters"].float(), strict=True))
    retriever.digests = dict(zip(names, hashes, strict=True))
    return retriever, metadata
