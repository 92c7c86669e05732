"""torch.compile for functions of a block: one graph for all layers, lengths and batches; steps
replayed past Python.

A compiled function has a graph for n = 1 token, one for n > 1 (of a whole decode step two, up to
SIMD_LANES and up to MAX_DECODE_ROWS rows), and these again while routing is recorded. Another kind
of gate, number of adapters a token or gate temperature is another block, with graphs of its own;
torch keeps them on disk between runs. More than torch's limit of recompiles is an error, for
fullgraph is set.

From one step of a decode loop to the next nothing changes but four tensors. Yet torch.compile
checks every tensor and module that a graph reads, and the graph's own Python allocates each buffer;
and as the weights have just swept the caches clean, that takes a third of the step (LOG.md). So for
a replayable cache one step is captured, every kernel with its buffers, and the steps that follow
call the kernels alone; on a GPU as a CUDA graph.
"""

import re
import threading
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch

from common.files import InputError

OPTIONS = {
    "pattern_matcher": False,
    "realize_reads_threshold": 2,  # a norm is computed once, not once for each row of the matmul that reads it
    "cpp.enable_floating_point_contract_flag": "fast",  # a * b + c in one instruction
    "size_asserts": False,  # of every input at every call: torch.compile's checks have seen them
}
MAX_DECODE_ROWS = 16  # rows of one new token each that a compiled block takes whole, attention included
SIMD_LANES = 8  # up to so many it has a graph of its own, where a vector has a lane for each (matmul.py)
LIBRARY = ("mm", "addmm", "bmm")  # matmuls that a graph leaves to torch, each into a buffer of its own
# All that a graph's Python may name to be captured: kernels, buffers, views. A Triton kernel, say,
# is none of these.
CAPTURED = re.compile(
    "cpp_fused.*|extern_kernels|torch|(b?float|int|uint)[0-9]+|bool|empty_strided_cpu|reinterpret_tensor|clear|"
    + "|".join(LIBRARY)
)
# `calls` while this thread captures a step: [(kernel, arguments, options)], None for what can't be.
# One at a time, as graphs and their kernels are everybody's; and two threads in torch.compile's
# checks at once have failed.
_capture = threading.local()
_one_at_a_time = threading.RLock()


def _inductor(graph, inputs):
    """torch's own compiler; what it makes can be captured."""
    from torch._functorch.config import patch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph, inputs, **options):
        made = compile_fx_inner(graph, inputs, **options)
        made.current_callable = _capturable(made.current_callable)
        return made

    with patch(
        enable_autograd_cache=False
    ):  # a hit there would not come by `inner`; the cache of kernels stays
        return compile_fx(graph, inputs, inner, OPTIONS)


def _capturable(graph):
    """A graph's generated function; while a step is captured, with kernels that note how they are
    called."""
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
        library = SimpleNamespace(
            **{name: noting(getattr(scope["extern_kernels"], name)) for name in LIBRARY}
        )
        with mock.patch.dict(scope, kernels, extern_kernels=library):
            return graph(args)

    return run


def can_compile(device):
    """Whether there is what torch.compile needs: on a CPU a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return device.type != "cpu" or bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def compile_function(function):
    """`function` through torch.compile, traced and compiled where it is first called. Raises
    InputError where the compiler fails."""
    torch.fx.experimental._config.use_duck_shape = (
        False  # sizes that happen to agree once are not the same size
    )
    torch._dynamo.config.recompile_limit = 64  # six graphs a kind of gate: many may be tried in one process
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=_inductor)

    def call(*inputs):
        try:
            with _one_at_a_time:
                return run(*inputs)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise InputError(
                f"torch.compile: {str(error).splitlines()[0]}; --no-compile goes without"
            ) from error

    return call


def statically_at_most(n, most):
    """n <= most; in a compiled block, where a number of tokens is a symbol, whether that is known
    of it."""
    if not torch.compiler.is_compiling():
        return n <= most
    return torch.fx.experimental.symbolic_shapes.statically_known_true(n <= most)


def compile_for_any_length(function):
    """The same for a function of a module and tensors whose first axis is the tokens'."""
    run = compile_function(function)
    return lambda module, *tensors: run(module, *mark_dynamic_tokens(*tensors))


def mark_dynamic_tokens(*tensors, decode=False):
    """Tells torch.compile that the first axis, where it isn't 1, will have other lengths: any, or
    where it is the rows of a `decode` batch those up to SIMD_LANES, or from there to
    MAX_DECODE_ROWS (a graph for both would depend on which fill a SIMD vector). On a CPU inductor
    is given the hint to assume 3 rows: else it parallelises over tokens, goes through eight in one
    turn, and leaves one thread idle (LOG.md)."""
    for x in tensors:
        size = len(x)
        if size > 1 and 0 not in getattr(x, "_dynamo_dynamic_indices", ()):
            least = most = hint = None
            if decode:
                least, most = (2, SIMD_LANES) if size <= SIMD_LANES else (SIMD_LANES + 1, MAX_DECODE_ROWS)
                hint = max(least, 3) if x.device.type == "cpu" else None
            torch._dynamo.mark_dynamic(x, 0, min=least, max=most, hint_override=hint)
    return tensors


class CapturedStep(NamedTuple):
    """A captured decode step, called with new inputs. It holds for `views` of a cache, as long as
    the cache's `replayable` is equal to `key`; `inputs` are overwritten before each call, `out` by
    it."""

    views: list
    key: object
    inputs: tuple
    calls: list
    out: torch.Tensor

    def __call__(self, *inputs):
        for stored, new in zip(self.inputs, inputs, strict=True):
            stored.copy_(new)
        for kernel, args, options in self.calls:
            kernel(*args, **options)
        return self.out


def replay(cache, views, inputs):
    """What the captured step of this cache makes of `inputs`, None where there is none or it
    doesn't hold any more."""
    step = cache.captured
    if step and step.views is views and step.key == cache.replayable:
        return step(*inputs)
    return None


def run_and_capture(run, layers, cache, views, inputs):
    """A new token in each row of the cache through all blocks by `run`, a compiled block: inputs (x
    (b, h), ...) -> (b, h). Where the cache is replayable the step is captured in it."""

    def through(x, *others):
        for layer, view in zip(layers, views, strict=True):
            x = run(layer, *mark_dynamic_tokens(x, *others, decode=True), view)
        return x

    key = cache.replayable if cache.end else None  # a prompt of one token is no step
    with _one_at_a_time:
        _capture.calls = calls = []
        try:
            out = through(*inputs)
        finally:
            _capture.calls = None
        if key is not None and out.is_cuda:
            kept = out.clone()  # the graph's own memory is another
            inputs = tuple(y.clone() for y in inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = through(*inputs)
            cache.captured = CapturedStep(views, key, inputs, [(graph.replay, (), {})], out)
            return kept
    whole = key is not None and None not in calls
    cache.captured = CapturedStep(views, key, inputs, calls, out) if whole else None
    return out
