"""The main command: prompts in, answers out, each token choosing its adapters.

    python generate.py --prompt "..."                     the embedded default, tiny/
    python generate.py --model DIR --pool DIR --prompt "..." --prompt "..." --method adapter:NAME --method meteora

For people who import it: load() gives a model with its adapters, stream() yields tokens as they
come, answer() waits for whole answers.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.files import InputError, read_jsonl, run_script
from common.options import Count, Whole, parse_args
from decoding.interactive import interact, print_pool
from decoding.respond import respond
from decoding.sampling import Sampling, check_values
from decoding.stream import answer, load, stream
from methods.batch import check_method, default_method
from methods.session import load_mole
from pool.load import TINY, read_adapters
from pool.retriever import sentence_encoder

__all__ = ["answer", "load", "stream"]


@dataclass
class Options(Sampling):
    """Options of generate.py."""

    prompt: list[str] = field(
        default_factory=list
    )  # what to answer, - reads standard input; repeatable: one batch
    model: str = ""  # model folder, default tiny/
    pool: str = ""  # pool folder, default the model's own
    adapter: list[str] = field(default_factory=list)  # NAME=DIR, one more PEFT adapter; repeatable
    list_: bool = False  # print the pool and stop
    prompts: str = (
        ""  # FILE.jsonl of {"prompt"} lines, and "method" where it is another; answered as one batch
    )
    interactive: bool = False  # a prompt loop; /help there lists what else it takes
    method: list[str] = field(
        default_factory=list
    )  # base, adapter:NAME, meteora, ... (README); once, or one a prompt
    top_k: int = 2  # adapters a token uses (which gates: meteora_topK)
    gate_temperature: float = 1.0  # of MeteoRA's softmax over the k chosen adapters
    retrieve: Count = 3  # adapters retrieved for a prompt (ramole, selection, mixture, fusion, logo)
    exclude: list[str] = field(default_factory=list)  # NAME of an adapter never to be used; repeatable
    encoder: str = ""  # sentence-transformers folder that finds them, instead of the base's hidden states
    resident: Whole = 0  # adapters in memory at most, the others wait on disk; 0 = all
    raw: bool = False  # no prompt template
    chat: bool = False  # the tokenizer's chat template instead of the pool's
    truncate: Literal["no", "left", "right"] = (
        "no"  # which end of a prompt longer than the context is cut off
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights, auto = the file's
    device: str = "auto"  # auto = cuda where there is one, else cpu
    compile: bool | None = (
        None  # the blocks, by torch.compile; default where many tokens of a large model pay for it
    )
    routing: bool | None = None  # show each token's adapter in colour, default on a terminal
    html: str = ""  # write the routing as a web page to this file
    json: bool = False  # one JSON object a prompt on standard output


START = """nanoMoLE: a Llama that carries many LoRA adapters and chooses among them, token by token.

  python generate.py --prompt "What is the plural of mouse?"     answer with the embedded model
  python generate.py --list                               the adapters it carries
  python generate.py --help                               every option
  python generate.py --model DIR --adapter NAME=DIR ...   your own Llama, your own PEFT adapters"""


def check_options(args, asked):
    """Raises InputError for options that exclude each other, and for values that nothing can use."""
    if args.raw and args.chat:
        raise InputError("--raw and --chat exclude each other")
    if len(args.method) > 1 and len(args.method) != len(asked):
        raise InputError(
            f"{len(args.method)} times --method for {len(asked)} prompts: give it once, or once a prompt"
        )
    check_values(args, args.top_k, args.gate_temperature)
    if args.html and Path(args.html).is_dir():
        raise InputError(f"--html {args.html}: is a directory, expected a file to write")


def read_requests(args):
    """[(prompt, its own method or "")] of --prompt and --prompts. Raises InputError."""
    asked = [(read_prompt(prompt), "") for prompt in args.prompt]
    for row in read_jsonl(args.prompts, ("prompt",)) if args.prompts else []:
        if not isinstance(row.get("method", ""), str):
            raise InputError(f"{args.prompts}: method is {row['method']!r}, expected the name of one")
        asked.append((row["prompt"], row.get("method", "")))
    return asked


def read_prompt(prompt):
    """The prompt, or standard input for "-". Raises InputError where it is not UTF-8: no tokenizer
    could encode it."""
    name = "--prompt"
    data = prompt.encode("utf-8", "surrogateescape")
    if prompt == "-":
        name = "standard input"
        data = sys.stdin.buffer.read().removesuffix(b"\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 at byte {error.start}") from None


def main():
    """The command: answers prompts, lists the pool, or prompts for more."""
    args = parse_args(
        Options, description="Answer prompts with a Llama that chooses among its LoRA adapters."
    )
    asked = read_requests(args)
    if not (args.prompt or args.prompts or args.list_ or args.interactive):
        print(START)
        return
    check_options(args, asked)
    adapters = read_adapters(args.adapter)
    embed = sentence_encoder(args.encoder) if args.encoder else None
    mole = load_mole(args.model or TINY, args.pool or None, adapters, args.dtype, args.device, args.resident)
    mole.embed = embed
    if args.list_:
        print_pool(mole)
        return
    for name in args.exclude:
        if not mole.pool:
            raise InputError(f"--exclude {name}: there are no adapters")
        mole.pool.member(name)
    name, why = default_method(mole, args.top_k, k_asked=args.top_k != Options.top_k)
    chosen = [check_method(mole, m, args.top_k) for m in (args.method or [name])]
    print(f"method: {', '.join(chosen)}" + ("" if args.method else f" ({why})"), file=sys.stderr)
    if asked:
        chosen = chosen if len(chosen) == len(asked) else chosen * len(asked)
        methods = [
            check_method(mole, own, args.top_k) if own else m
            for (_, own), m in zip(asked, chosen, strict=True)
        ]
        respond(mole, [prompt for prompt, _ in asked], methods, args)
    if args.interactive:
        interact(mole, chosen[0], args)


if __name__ == "__main__":
    run_script(main)
