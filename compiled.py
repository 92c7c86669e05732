"""torch.compile for a Llama's blocks: one graph for all layers, lengths and batches, and a way past its guards.

What comes before a block's attention and what comes after it know tokens alone, not sequences, and are compiled each
(model.Block.before, after). For a new token in each of a few rows, two blocks are compiled whole, attention included
(model.Block.step). Each has a graph for n = 1 where that occurs, one for n > 1, and these again while routing is
recorded, and where rows of a batch have a fixed adapter; torch keeps them on disk between runs. More than torch's limit
of recompiles is an error, for fullgraph is set.

From one step of a decoding loop to the next nothing changes but four tensors, yet torch.compile checks every tensor
and module that a graph reads, and as the weights have just swept the processor's caches clean these checks take as long
as half of the block itself (LOG.md). So a steady cache (KVCache.steady) lets one step through the checks, notes
graphs and inputs, and calls the graphs by themselves in the steps that follow.
"""

import torch

from files import InputError

OPTIONS = {
    "realize_reads_threshold": 2,  # a norm is computed once, not once for each row of the product that reads it
    "cpp.enable_floating_point_contract_flag": "fast",  # a * b + c in one instruction
    "size_asserts": False,  # of every input at every call: the checks above have seen them
}
_noted = []  # (graph, its inputs) of the last call


def _inductor(graph, inputs):
    """torch's own compiler; what it makes notes how it is called."""
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(graph, inputs, config_patches=OPTIONS)

    def run(*inputs):
        _noted[:] = [(compiled, list(inputs))]
        return compiled(*inputs)

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
    run = torch.compile(function, fullgraph=True, dynamic=False, backend=_inductor)

    def call(*inputs):
        try:
            return run(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise InputError(f"torch.compile: {str(error).splitlines()[0]}; --no-compile goes without") from error

    return call


def compile_for_any_length(function):
    """The same for a function of a module and tensors whose first axis is the tokens'."""
    run = compile_function(function)
    return lambda module, *tensors: run(module, *of_any_length(*tensors))


def of_any_length(*tensors):
    """Says to the compiler that the first axis, where it isn't 1, will have other lengths."""
    for x in tensors:
        if len(x) > 1 and not hasattr(x, "_dynamo_dynamic_indices"):
            torch._dynamo.mark_dynamic(x, 0)
    return tensors


def step_through(run, layers, x, cos, sin, positions, cache, end):
    """A new token in each row of the cache through all blocks, two at a time by `run`, the compiled step_blocks():
    x (b, h) -> (b, h)."""
    views = cache.views(end)
    if cache.steady and cache.noted and cache.noted[0] is views:
        for graph, inputs, places in cache.noted[1]:
            for place, which in places:
                inputs[place] = (x, cos, sin, positions)[which]
            (x,) = graph(*inputs)
        return x
    calls, together = [], 2 - len(layers) % 2
    for start in range(0, len(layers), together):
        some, moving = slice(start, start + together), of_any_length(x, cos, sin, positions)
        x = run(list(layers[some]), *moving, views[some])
        graph, inputs = _noted.pop()
        places = [(j, which) for j, y in enumerate(inputs) for which, z in enumerate(moving) if y is z]
        calls.append((graph, inputs, places))
    cache.noted = (views, calls) if cache.end else None  # a prompt of one token is no step
    return x


def step_blocks(layers, x, cos, sin, positions, views):
    for layer, view in zip(layers, views, strict=True):
        x = layer.step(x, cos, sin, positions, view)
    return x
