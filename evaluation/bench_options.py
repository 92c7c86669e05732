"""The options that all benchmarks share, and those of the commands that bench.py itself computes."""

from dataclasses import dataclass
from typing import Literal

from common.options import BatchSize, Count, Counts, Rank, Seed, Whole


@dataclass
class Bench:
    """Options that all benchmarks share."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of base, adapters and gates
    device: str = "auto"  # auto = cuda where there is one, else cpu
    threads: Whole = 0  # CPU threads, 0 = one a core
    repeats: Count = 20  # repetitions of every row
    r: Rank = 8  # rank of the adapters
    seed: Seed = 0  # seed for adapters, gates and inputs


@dataclass
class LayerBench(Bench):
    """Options of `bench.py layer`."""

    n: Counts = "1,4,32,256,1024"  # tokens
    width: str = "576x1536,2048x2048,4096x4096,4096x14336"  # in and out features of the Linear
    e: Counts = "4,28,128"  # adapters in the pool
    k: Counts = "1,2,4"  # adapters a token uses


@dataclass
class ModelBench(Bench):
    """Options of benchmarks of a whole model."""

    model: str = ""  # folder or hub name ORG/NAME[@REVISION], default tiny/
    peers: bool = True  # also transformers and peft, where they are installed
    k: Count = 2  # adapters a token uses


@dataclass
class RoutedBench(ModelBench):
    """Options of benchmarks of a model with adapters and gates."""

    pool: str = ""  # pool folder with meteora_topK gates; default: random adapters and even gates
    tasks: str = ""  # task folders whose prompts are used; default: random tokens
    e: Counts = "28"  # random adapters in the pool; several, as 4,28,128, are a row each
    gguf: str = ""  # the model as GGUF file of the same dtype, for llama-cpp-python


@dataclass
class DecodeBench(RoutedBench):
    """Options of `bench.py decode`."""

    context: Count = 64  # tokens of the prompt
    tokens: Count = 16  # tokens decoded in a repetition
    batch_size: BatchSize = 8  # requests decoded together, beside one by itself
    requests: Whole = 0  # requests with other adapters each, decoded together by RAMoLE, 0 = none
    union: Counts = "12,28,48"  # how many adapters those have together; several are a row each


@dataclass
class PrefillBench(RoutedBench):
    """Options of `bench.py prefill`."""

    tokens: Count = 512  # tokens of the prompt
    shape: Literal["", "llama-3-8b"] = ""  # instead of --model one random block of these sizes


@dataclass
class TrainBench(ModelBench):
    """Options of `bench.py train`."""

    e: Count = 8  # adapters trained at once
    gated: Count = 28  # adapters under the gates that are trained
    tokens: Count = 128  # tokens of a random example; half of them are the response
    tasks: str = ""  # task folders: their examples of at most 512 tokens instead of random ones
    each: BatchSize = 1  # examples a step and adapter
