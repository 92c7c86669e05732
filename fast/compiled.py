"""torch.compile for a Llama's blocks: one graph for all layers, lengths and batches, and a way past Python.

What comes before a block's attention and what comes after it know tokens alone, not sequences, and are compiled each
(model.Block.before, after). For a new token in each of a few rows, a block is compiled whole, attention included
(model.Block.step). Each has a graph for n = 1 where that occurs, one for n > 1 (the step two, up to LANES and up to
FEW), and these again while routing is recorded. Another kind of gate, number of adapters a token or gate temperature is
another block, with graphs of its own; torch keeps them on disk between runs. More than torch's limit of recompiles is
an error, for fullgraph is set.

From one step of a decoding loop to the next nothing changes but four tensors. Yet torch.compile checks every tensor and
module that a graph reads, and the graph's own Python allocates each buffer; and as the weights have just swept the
processor's caches clean, that takes a third of the step (LOG.md). So for a steady cache (KVCache.steady) one step is
captured, every kernel with its buffers, and the steps that follow call the kernels alone; on a GPU as a CUDA graph.
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
    "realize_reads_threshold": 2,  # a norm is computed once, not once for each row of the product that reads it
    "cpp.enable_floating_point_contract_flag": "fast",  # a * b + c in one instruction
    "size_asserts": False,  # of every input at every call: torch.compile's checks have seen them
}
FEW = 16  # rows of one new token each that a compiled block takes whole, attention included
LANES = 8  # up to so many it has a graph of its own, where a vector has a lane for each (products.py)
LIBRARY = ("mm", "addmm", "bmm")  # products that a graph leaves to torch, each into a buffer of its own
# All that a graph's Python may name to be captured: kernels, buffers, views. A Triton kernel, say, is none of these.
CAPTURED = re.compile(
    "cpp_fused.*|extern_kernels|torch|(b?float|int|uint)[0-9]+|bool|empty_strided_cpu|reinterpret_tensor|clear|"
    + "|".join(LIBRARY)
)
# `calls` while this thread captures a step: [(kernel, arguments, options)], None for what can't be. One at a time, as
# graphs and their kernels are everybody's; and two threads in torch.compile's checks at once have failed.
_capture, _one_at_a_time = threading.local(), threading.RLock()


def _inductor(graph, inputs):
    """torch's own compiler; what it makes can be captured."""
    from torch._functorch.config import patch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph, inputs, **options):
        made = compile_fx_inner(graph, inputs, **options)
        made.current_callable = _capturable(made.current_callable)
        return made

    with patch(enable_autograd_cache=False):  # a hit there would not come by `inner`; the cache of kernels stays
        return compile_fx(graph, inputs, inner, OPTIONS)


def _capturable(graph):
    """A graph's generated function; while a step is captured, with kernels that note how they are called."""
    scope, names = getattr(graph, "__globals__", {}), getattr(graph, "__code__", _capturable.__code__).co_names

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
        library = SimpleNamespace(**{name: noting(getattr(scope["extern_kernels"], name)) for name in LIBRARY})
        with mock.patch.dict(scope, kernels, extern_kernels=library):
            return graph(args)

    return run


def possible(device):
    """Whether there is what torch.compile needs: on a CPU a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return device.type != "cpu" or bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def compile_function(function):
    """`function` through torch.compile, traced and compiled where it is first called. Raises InputError where the
    compiler fails."""
    torch.fx.experimental._config.use_duck_shape = False  # sizes that happen to agree once are not the same size
    torch._dynamo.config.recompile_limit = 64  # six graphs a kind of gate: many may be tried in one process
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=_inductor)

    def call(*inputs):
        try:
            with _one_at_a_time:
                return run(*inputs)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise InputError(f"torch.compile: {str(error).splitlines()[0]}; --no-compile goes without") from error

    return call


def at_most(n, most):
    """n <= most; in a compiled block, where a number of tokens is a symbol, whether that is known of it."""
    if not torch.compiler.is_compiling():
        return n <= most
    return torch.fx.experimental.symbolic_shapes.statically_known_true(n <= most)


def compile_for_any_length(function):
    """The same for a function of a module and tensors whose first axis is the tokens'."""
    run = compile_function(function)
    return lambda module, *tensors: run(module, *of_any_length(*tensors))


def of_any_length(*tensors, few=False):
    """Says to the compiler that the first axis, where it isn't 1, will have other lengths: any, or where it is `few`
    those up to LANES or those from there to FEW (a graph for both would depend on which fill a processor's vector).
    On a CPU it is told that few are three: it shares a loop among threads by its first axis alone where it believes
    that longer, and then goes through eight tokens in one turn, in one thread (LOG.md)."""
    for x in tensors:
        size = len(x)
        if size > 1 and 0 not in getattr(x, "_dynamo_dynamic_indices", ()):
            least, most = (None, None) if not few else (2, LANES) if size <= LANES else (LANES + 1, FEW)
            told = max(least, 3) if few and x.device.type == "cpu" else None
            torch._dynamo.mark_dynamic(x, 0, min=least, max=most, hint_override=told)
    return tensors


class Step(NamedTuple):
    """A captured step: it holds for `views` of a cache; `inputs` are overwritten before, `out` by each."""

    views: list
    inputs: tuple
    calls: list
    out: torch.Tensor

    def __call__(self, *inputs):
        for place, new in zip(self.inputs, inputs, strict=True):
            place.copy_(new)
        for kernel, args, options in self.calls:
            kernel(*args, **options)
        return self.out


def step_through(run, layers, x, cos, sin, positions, cache, end):
    """A new token in each row of the cache through all blocks by `run`, the compiled Block.step: x (b, h) -> (b, h)."""
    views, inputs = cache.views(end), (x, cos, sin, positions)
    if cache.captured and cache.captured.views is views:
        return cache.captured(*inputs)

    def through(x, *others):
        for layer, view in zip(layers, views, strict=True):
            x = run(layer, *of_any_length(x, *others, few=True), view)
        return x

    steady = cache.steady and cache.end  # a prompt of one token is no step
    with _one_at_a_time:
        _capture.calls = calls = []
        try:
            out = through(*inputs)
        finally:
            _capture.calls = None
        if steady and x.is_cuda:
            kept = out.clone()  # the graph's own memory is another
            inputs, graph = tuple(y.clone() for y in inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = through(*inputs)
            cache.captured = Step(views, inputs, [(graph.replay, (), {})], out)
            return kept
    cache.captured = Step(views, inputs, calls, out) if steady and None not in calls else None
    return out
