"""torch.compile for functions of a block, one graph for all layers, lengths and batches; captured
decode steps.

A compiled function has one graph for n = 1 token and one for n > 1. A whole decode step has two for
n > 1: up to SIMD_LANES rows, and up to MAX_DECODE_ROWS. While routing is recorded each of these is
compiled once more. Another kind of gate, number of adapters a token or gate temperature is a
recompile. torch keeps the graphs on disk between runs. fullgraph is set, so more recompiles than
torch's limit are an error.

Between two steps of a decode loop only four tensors change. Yet torch.compile checks every tensor
and module that a graph reads, and the graph's Python code allocates each buffer. Reading the
weights has just emptied the caches, so this takes a third of the step (LOG.md). For a replayable
cache one step is therefore captured: every kernel with its buffers. The steps that follow call
these kernels alone; on a GPU they replay a CUDA graph.
"""

import re
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from common.files import InputError

OPTIONS = {
    "pattern_matcher": False,
    "realize_reads_threshold": 2,  # compute a norm once, not once for each row of the next matmul
    "cpp.enable_floating_point_contract_flag": "fast",  # a * b + c in one instruction
    "size_asserts": False,  # torch.compile's guards have checked the inputs' sizes already
}
MAX_DECODE_ROWS = 16  # a decode batch of at most so many rows is compiled with its attention
SIMD_LANES = 8  # floats in a SIMD vector; up to so many rows have a graph for it (matmul.py)
LIBRARY = ("mm", "addmm", "bmm")  # matmuls that a graph calls in torch, each with its output buffer
# A graph can be captured where its Python code names nothing else than these kernels, buffers and
# views. A Triton kernel, for example, is none of them.
CAPTURED = re.compile(
    "cpp_fused.*|extern_kernels|torch|(b?float|int|uint)[0-9]+|bool|"
    "empty_strided_cpu|reinterpret_tensor|clear|" + "|".join(LIBRARY)
)
# While this thread captures a step, `calls` is [(kernel, arguments, options)], with None for a call
# that can't be captured. All threads share the graphs and their kernels, and two threads in
# torch.compile's guards at once have failed: hence the lock.
_capture = threading.local()
_one_at_a_time = threading.RLock()


def _inductor(graph, inputs):
    """torch's own compiler, with graphs that can be captured."""
    from torch._functorch.config import patch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph, inputs, **options):
        made = compile_fx_inner(graph, inputs, **options)
        made.current_callable = _capturable(made.current_callable)
        return made

    # A hit in this cache would bypass `inner`. The cache of kernels is another and stays on.
    with patch(enable_autograd_cache=False):
        return compile_fx(graph, inputs, inner, OPTIONS)


def _capturable(graph):
    """Wraps a graph's generated function, whose kernels note their calls during a capture."""
    scope = getattr(graph, "__globals__", {})
    names = getattr(graph, "__code__", _capturable.__code__).co_names

    def noting(kernel):
        def note(*args, **options):
            if getattr(_capture, "calls", None) is not None:
                _capture.calls.append((kernel, args, options))
            return kernel(*args, **options)

        return note

    def run(args):
        calls = getattr(_capture, "calls", None)
        if calls is None:
            return graph(args)
        if not all(map(CAPTURED.fullmatch, names)):
            calls.append(None)
            return graph(args)
        kernels = {name: noting(scope[name]) for name in names if name.startswith("cpp_fused")}
        matmuls = {name: noting(getattr(scope["extern_kernels"], name)) for name in LIBRARY}
        with mock.patch.dict(scope, kernels, extern_kernels=SimpleNamespace(**matmuls)):
            return graph(args)

    return run


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: on a CPU that is a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return device.type != "cpu" or bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def compile_function(function: Callable) -> Callable:
    """`function` through torch.compile, which compiles it at its first call. The result raises
    InputError where the compiler fails."""
    # Sizes that are equal in the first call may differ in later ones.
    torch.fx.experimental._config.use_duck_shape = False
    # A kind of gate has six graphs, and one process may try many kinds.
    torch._dynamo.config.recompile_limit = 64
    errors = torch._dynamo.exc
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=_inductor)

    def call(*inputs):
        try:
            with _one_at_a_time:
                return run(*inputs)
        except (errors.BackendCompilerFailed, errors.FailOnRecompileLimitHit) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"torch.compile: {reason}; --no-compile goes without") from error

    return call


def statically_at_most(n: int | torch.SymInt, most: int) -> bool:
    """n <= most; where n is a compiled block's symbol, whether this holds for all its values."""
    if not torch.compiler.is_compiling():
        return n <= most
    return torch.fx.experimental.symbolic_shapes.statically_known_true(n <= most)


def compile_for_any_length(function: Callable) -> Callable:
    """compile_function for a function of a module and of tensors whose first axis is tokens."""
    run = compile_function(function)
    return lambda module, *tensors: run(module, *mark_dynamic_tokens(*tensors))


def mark_dynamic_tokens(*tensors: torch.Tensor, decode: bool = False) -> tuple[torch.Tensor, ...]:
    """Tells torch.compile that the first axis will have other lengths, where it isn't 1 now.

    For the rows of a `decode` batch the lengths are bounded: up to SIMD_LANES, or from there to
    MAX_DECODE_ROWS, because the two fill SIMD vectors differently. On a CPU inductor gets the hint
    to assume 3 rows: else it parallelises over tokens, eight at a time, and leaves one thread idle
    (LOG.md). Returns the tensors.
    """
    for x in tensors:
        size = len(x)
        if size > 1 and 0 not in getattr(x, "_dynamo_dynamic_indices", ()):
            least = most = hint = None
            if decode:
                least = 2 if size <= SIMD_LANES else SIMD_LANES + 1
                most = SIMD_LANES if size <= SIMD_LANES else MAX_DECODE_ROWS
                hint = max(least, 3) if x.device.type == "cpu" else None
            torch._dynamo.mark_dynamic(x, 0, min=least, max=most, hint_override=hint)
    return tensors


class CapturedStep(NamedTuple):
    """A captured decode step. It holds for `views` of a cache while the cache's `replayable` equals
    `key`. A call copies new inputs into `inputs`, runs `calls`, and finds its result in `out`."""

    views: list
    key: object
    inputs: tuple
    calls: list
    out: torch.Tensor

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for stored, new in zip(self.inputs, inputs, strict=True):
            stored.copy_(new)
        for kernel, args, options in self.calls:
            kernel(*args, **options)
        return self.out


def replay(cache, views: list, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
    """Runs the captured step of a FastKVCache on `inputs`. None where there is no captured step or
    it doesn't hold any more."""
    step = cache.captured
    if step and step.views is views and step.key == cache.replayable:
        return step(*inputs)
    return None


def run_and_capture(
    run: Callable, layers: nn.ModuleList, cache, views: list, inputs: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """A decode step, one token in each row of a FastKVCache: inputs (x (b, h), ...) -> (b, h).

    `run` is a compiled block. Where the cache is replayable it keeps the captured step.
    """

    def through(x, *others):
        for layer, view in zip(layers, views, strict=True):
            x = run(layer, *mark_dynamic_tokens(x, *others, decode=True), view)
        return x

    key = cache.replayable if cache.end else None  # a prompt of one token isn't a step
    with _one_at_a_time:
        _capture.calls = calls = []
        try:
            out = through(*inputs)
        finally:
            _capture.calls = None
        if key is not None and out.is_cuda:
            kept = out.clone()  # the `out` below isn't computed before a replay
            inputs = tuple(y.clone() for y in inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = through(*inputs)
            cache.captured = CapturedStep(views, key, inputs, [(graph.replay, (), {})], out)
            return kept
    whole = key is not None and None not in calls
    cache.captured = CapturedStep(views, key, inputs, calls, out) if whole else None
    return out
