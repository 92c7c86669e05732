"""The main command: prompts in, answers out, each token choosing its adapters.

    python generate.py --prompt "..."                                  the embedded model, tiny/
    python generate.py --model DIR --pool DIR --prompt "..." --method meteora      your own model

For people who import it: load() gives a model with its adapters, stream() yields tokens as they
come, answer() waits for whole answers.
"""

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds, ends in one line
    from common.signals import end_at_once

    end_at_once()

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.endings import run_script
from common.files import InputError, check_text, check_writable, read_jsonl, say
from common.options import Above0, Count, Whole, parse_args
from common.template import CHAT, TemplateOptions, asked_template
from decoding.export import export
from decoding.init_pool import init_pool, read_samples
from decoding.interactive import interact, print_pool
from decoding.respond import respond
from decoding.sampling import Sampling, check_values
from decoding.stream import answer, load, stream
from methods.batch import check_method, check_name, default_method, named_methods
from methods.lora_retriever import SAMPLES, draw_prompts
from methods.session import Mole, find_mole, load_weights
from pool.load import TINY, read_adapters
from pool.retriever import sentence_encoder
from tasks.folders import load_tasks

__all__ = ["answer", "load", "stream"]


@dataclass
class Options(TemplateOptions, Sampling):
    """Options of generate.py."""

    prompt: list[str] = field(default_factory=list)  # - is standard input; repeatable: one batch
    model: str = ""  # folder or hub name ORG/NAME[@REVISION], default tiny/
    pool: str = ""  # pool or a folder of PEFT folders, default the model's own
    adapter: list[str] = field(default_factory=list)  # NAME=DIR, a PEFT folder or hub name; repeatable
    list_: bool = False  # print the pool and stop
    init: bool = False  # make a pool of PEFT folders: writes what --pool lacks, and stops
    samples: list[str] = field(default_factory=list)  # --init: NAME=FILE, a prompt a line; repeatable
    tasks: str = ""  # --init: task folders named like adapters, or one file, to take samples from
    write_samples: Whole = 0  # --init: prompts the model writes for an adapter without; yours do better
    prompts: str = ""  # FILE.jsonl of {"prompt"}, also "method" and "stop" [TEXT, ...]; one batch
    interactive: bool = False  # a prompt loop; /help there lists what else it takes
    method: list[str] = field(default_factory=list)  # base, meteora, ...; one, or one a prompt
    mix: list[str] = field(default_factory=list)  # NAME=WEIGHT,...: a fixed sum; one, or one a prompt
    top_k: Count = 2  # adapters a token uses (which gates: meteora_topK)
    gate_temperature: Above0 = 1.0  # temperature of MeteoRA's softmax over the k chosen adapters
    retrieve: Count = 3  # adapters retrieved for a prompt (ramole, selection, fusion, logo, ...)
    exclude: list[str] = field(default_factory=list)  # NAME of an adapter never to be used; repeatable
    encoder: str = ""  # sentence-transformers folder to retrieve with, not the base's hidden states
    resident: Whole = 0  # adapters in memory at most, the others stay on disk; 0 = all
    system: str = ""  # system message of a chat
    truncate: Literal["no", "left", "right"] = "no"  # where to cut a prompt that is longer than the context
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # the weights' dtype, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    compile: bool | None = None  # torch.compile the blocks; default where that saves time
    routing: bool | None = None  # show each token's adapter in colour, default on a terminal
    html: str = ""  # write a page to explore the routing, token by token and Linear by Linear, to this file
    svg: str = ""  # write the first prompt's routing as a picture to this file
    json: bool = False  # one JSON object a prompt on standard output
    export: str = ""  # write the mixture of --mix or --method into this new folder, as one PEFT adapter
    export_rank: Whole = 0  # rank of the exported adapter, by truncated SVD; 0 = the sum of the ranks, exact
    export_merged: bool = False  # export a model folder: the base with the mixture merged into its weights


START = """nanoMoLE: a Llama that carries many LoRA adapters and chooses among them, token by token.

  python generate.py --prompt "What is the plural of mouse?"     answer with the embedded model
  python generate.py --list                               the adapters it carries
  python generate.py --help                               every option
  python generate.py --model DIR --adapter NAME=DIR ...   your own Llama, your own PEFT adapters"""


@dataclass
class Request:
    """One prompt to answer."""

    prompt: str
    method: str = ""  # "" is --method's
    stop: list[str] | None = None  # None is --stop's


def check_options(args: Options, asked: list[Request]) -> None:
    """Raises InputError for options that exclude each other and for values out of range."""
    check_text(args.system, "--system")
    for name, values in (("--method", args.method), ("--mix", args.mix)):
        if len(values) > 1 and len(values) != len(asked):
            found = f"{len(values)} times {name} for {len(asked)} prompts"
            raise InputError(f"{found}: give it once, or once a prompt")
    if args.mix and args.method:
        raise InputError("--mix and --method exclude each other: as a method a mix is mix:NAME=WEIGHT,...")
    for name in ("samples", "tasks", "write_samples"):
        if getattr(args, name) and not args.init:
            raise InputError(f"--{name} is for --init")
    check_values(args, args.top_k, args.gate_temperature)
    if args.html and Path(args.html).resolve() == Path(args.svg).resolve():
        raise InputError(f"--html and --svg: both are {args.html}, expected two files")
    for path in filter(None, (args.html, args.svg)):
        check_writable(path)


def read_requests(args: Options) -> list[Request]:
    """The requests of --prompt and --prompts. Raises InputError."""
    asked = [Request(read_prompt(prompt)) for prompt in args.prompt]
    if args.prompts:
        for row in read_jsonl(args.prompts, ("prompt",), pipe=True):
            request = Request(row["prompt"], row.get("method", ""), row.get("stop"))
            if not isinstance(request.method, str):
                raise InputError(f"{args.prompts}: method is {request.method!r}, expected the name of one")
            stop = [] if request.stop is None else request.stop
            if not (isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)):
                raise InputError(f"{args.prompts}: stop is {stop!r}, expected a list of texts")
            asked.append(request)
        if len(asked) == len(args.prompt):
            raise InputError(f'{args.prompts}: holds no prompt, expected {{"prompt": TEXT}} a line')
    return asked


def read_init(args: Options, names: list[str]) -> dict[str, list[str]]:
    """{adapter: samples} that --init was given for the adapters `names`. Raises InputError."""
    if not args.pool:
        raise InputError("--init: name the folder that becomes a pool with --pool")
    samples = {}
    if args.tasks:
        for name, task in load_tasks(args.tasks).items():
            if name in names:
                samples[name] = draw_prompts(task, SAMPLES, args.seed)
        if not samples:
            raise InputError(f"--tasks {args.tasks}: no task has an adapter's name: {', '.join(names)}")
    return samples | read_samples(args.samples, names)


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for "-". Raises InputError where it is not UTF-8."""
    name = "--prompt"
    data = prompt.encode("utf-8", "surrogateescape")
    if prompt == "-":
        name = "standard input"
        data = sys.stdin.buffer.read().removesuffix(b"\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}") from None


def check_names(mole: Mole, args: Options, asked: list[Request]) -> None:
    """Raises InputError for an adapter, a method or a template that isn't there."""
    if args.system and mole.template != CHAT:
        raise InputError("--system is a message of a chat template: add --chat")
    for name in args.exclude:
        if not mole.pool.members:
            raise InputError(f"--exclude {name}: there are no adapters")
        mole.pool.member(name)
    for name in [*named_methods(args), *(request.method for request in asked if request.method)]:
        check_name(mole, name, args.top_k)


def main() -> None:
    """The command: answers prompts, lists the pool, or prompts for more."""
    about = "Answer prompts with a Llama that chooses among its LoRA adapters. The first token takes 2 to 5 "
    about += "seconds with a model of 135M parameters on two CPU cores, --init as long, --compile 10 or more."
    args = parse_args(Options, description=about)
    if args.export or args.export_rank or args.export_merged:
        export(args)
        return
    asked = read_requests(args)
    if not (args.prompt or args.prompts or args.list_ or args.interactive or args.init):
        print(START)
        return
    check_options(args, asked)
    template = asked_template(args)
    mole = find_mole(args.model or TINY, args.pool or None, read_adapters(args.adapter), template)
    check_names(mole, args, asked)
    mole.embed = sentence_encoder(args.encoder) if args.encoder else None
    samples = read_init(args, mole.pool.names) if args.init else {}
    load_weights(mole, args.dtype, args.device, args.resident)
    if args.init:
        init_pool(mole, samples, args.write_samples, args.seed)
    if args.init or args.list_:
        print_pool(mole)
        return
    name, why = default_method(mole, args.top_k, k_asked=args.top_k != Options.top_k)
    named = named_methods(args)
    chosen = named or [name]
    for method in chosen:
        check_method(mole, method, args.top_k)
    say(f"method: {', '.join(chosen)}" + ("" if named else f" ({why})"))
    say(f"template: {mole.template!r} ({mole.template_from})")
    if asked:
        defaults = chosen if len(chosen) == len(asked) else chosen * len(asked)
        methods = []
        for request, default in zip(asked, defaults, strict=True):
            methods.append(check_method(mole, request.method or default, args.top_k))
        stops = [args.stop if request.stop is None else request.stop for request in asked]
        respond(mole, [request.prompt for request in asked], methods, args, stops)
    if args.interactive:
        interact(mole, chosen[0], args)


if __name__ == "__main__":
    run_script(main)
