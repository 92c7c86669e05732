"""Writes the mixture that a command line names: as one PEFT adapter, or merged into its base."""

from pathlib import Path

import torch

from common.devices import DTYPES
from common.files import InputError, say
from common.hub import find_folder
from methods.batch import check_method, check_request, find_method, listed_method, named_methods
from methods.protocol import FixedMixture, Merged, Method, OwnLinears
from methods.session import Mole
from pool.adapters import Adapter, linear_shapes, save_adapter
from pool.export import (
    cast_adapter,
    check_new_folder,
    deltas_of,
    merge_into_base,
    mixture_adapter,
    truncate,
    write_model,
)
from pool.folder import find_pool
from pool.load import TINY, load_base, load_pool, read_adapters

ANSWERS = ("prompt", "prompts", "interactive", "list_", "html", "svg")  # options that ask for something else


def export(args) -> None:
    """Writes args.export, of the options of generate.py; nothing that exists is overwritten.

    What is written is computed in float32 from the adapters as they are stored, whatever the base's
    dtype. Raises InputError; for options that exclude each other before any file is opened.
    """
    name = check_options(args)
    if method := listed_method(name):
        check_exportable(method, args)
    extra = read_adapters(args.adapter)
    folder = find_folder(args.model or TINY, "model")
    pool_folder = find_pool(folder, args.pool, extra)
    base = load_base(folder, "auto", args.device, fast=False)
    pool = load_pool(base, folder, pool_folder, args.resident, torch.float32)
    mole = Mole(base, None, linear_shapes(base), pool, pool_folder)
    check_method(mole, name)
    method = find_method(mole, name)
    for member in args.exclude:
        pool.member(member)
    check_request(mole, method, [], args.exclude)
    if args.export_merged:
        export_merged(mole, method, args, folder)
    else:
        export_adapter(mole, method, args)
    say(f"wrote {args.export}")


def check_options(args) -> str:
    """The name of the method to export. Raises InputError for options that don't go together."""
    if not args.export:
        option = "--export_merged" if args.export_merged else "--export_rank"
        raise InputError(f"{option}: add --export DIR, the new folder to write")
    for option in ANSWERS:
        if getattr(args, option):
            raise InputError(f"--export answers nothing: leave out --{option.rstrip('_')}")
    named = named_methods(args)
    if len(named) != 1:
        found = f"{len(named)} of --mix and --method"
        raise InputError(f"--export {args.export}: found {found}, expected one, which says what to export")
    if args.export_merged and args.export_rank:
        raise InputError("--export_rank and --export_merged exclude each other: merged, any rank is exact")
    if args.export_merged and args.dtype != "auto":
        raise InputError("--export_merged keeps the base's dtype, which its config.json names: "
                         "leave out --dtype")  # fmt: skip
    check_new_folder(args.export)
    return named[0]


def check_exportable(method: Method, args) -> None:
    """Raises InputError unless the method is one fixed mixture of adapters, whatever the prompt."""
    refused = f"method {method.name} can't be exported"
    if not method.needs_adapters:
        raise InputError(f"{refused}: it uses no adapter")
    if isinstance(method, OwnLinears) and method.edits_W:
        if not args.export_merged:
            raise InputError(f"{refused} as an adapter: it edits the base's weights: add --export_merged")
    elif method.retrieves or not isinstance(method, FixedMixture | Merged):
        expected = "expected one mixture for all prompts, like --mix NAME=WEIGHT,..."
        raise InputError(f"{refused}: it chooses for each prompt or token; {expected}")


def fixed_adapter(mole: Mole, method: FixedMixture | Merged, args) -> Adapter:
    """The one adapter that the method is."""
    name = Path(args.export).name
    if isinstance(method, FixedMixture):
        return mixture_adapter(mole.pool, method.weights(mole, [], args.exclude), name)
    return method.merge(mole, [], args.exclude)


def export_adapter(mole: Mole, method: FixedMixture | Merged, args) -> None:
    """Writes the PEFT folder args.export, in float32 unless args.dtype is another one. With
    args.export_rank prints the error of the truncation."""
    adapter = fixed_adapter(mole, method, args)
    if args.export_rank:
        adapter, error, errors = truncate(adapter, args.export_rank)
        worst = max(errors, key=errors.get)
        print(f"rank {adapter.rank}: relative error {error:.3g}, worst {errors[worst]:.3g} in {worst}")
    dtype = DTYPES.get(args.dtype, torch.float32)
    save_adapter(cast_adapter(adapter, dtype, args.export), args.export)


def export_merged(mole: Mole, method: Method, args, base: Path | str) -> None:
    """Writes the model folder args.export, of the model folder `base`."""
    if isinstance(method, OwnLinears):
        deltas = method.deltas(mole, args.exclude).items()
    else:
        deltas = deltas_of(fixed_adapter(mole, method, args))
    merge_into_base(mole.model, deltas, args.export)
    write_model(mole.model, base, args.export)
