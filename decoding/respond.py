"""Answers a batch as the command does: text as it streams, lines of JSON, a web page, a picture."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence

from common.files import say, write_text
from common.printable import json_line
from common.tokenizer import TextStream
from decoding.loop import Token, decode
from decoding.page import write_page
from decoding.prompts import encode_prompt, warn_of_empty
from decoding.stream import compile_for
from methods.batch import retrieve, set_methods
from methods.session import Mole
from pictures.page_weights import LinearWeights
from pictures.palette import Trace
from pictures.svg import svg_picture
from pictures.terminal import Printer


def result(prompt: str, method: str, tokens: list[Token], prompt_tokens: list[dict],
           seconds: float, retrieved: list) -> dict:  # fmt: skip
    """The JSON object of one answer; the texts of its tokens, joined, are its text."""
    kept = [{"id": token.id, "text": token.text, "adapters": token.adapters} for token in tokens]
    last = tokens[-1]
    if last.finish == "eos":
        kept.pop()
        if kept:
            kept[-1]["text"] += last.text  # what was held back until the EOS
    return {
        "prompt": prompt,
        "text": "".join(token.text for token in tokens),
        "method": method,
        "finish_reason": last.finish,
        "tokens": kept,
        "prompt_tokens": prompt_tokens,
        "retrieved": retrieved,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(tokens) / seconds, 2),
    }


def trace_prompt(mole: Mole, ids: list[int], adapters: list) -> list[dict]:
    """A prompt's tokens, {"id", "text", "adapters"} each, as --json prints them."""
    texts = TextStream(mole.tokenizer)
    rows = []
    for index, used in zip(ids, adapters, strict=True):
        rows.append({"id": index, "text": texts.push(index), "adapters": used})
    rows[-1]["text"] += texts.flush()
    return rows


def _trace(tokens):
    """What pictures/ draws of a prompt's tokens: [(text, adapters)]."""
    return [(token["text"], token["adapters"]) for token in tokens]


def respond(mole: Mole, prompts: list[str], methods: list[str], args, stops=None,
            turns: Sequence[dict] = ()) -> list[tuple[Trace, Trace]]:  # fmt: skip
    """Decodes a batch and shows it as asked: text, JSON lines, a web page, a picture. `stops`: a list
    of texts for each prompt, by default args.stop; `turns`: the messages of the conversation so
    far, with the chat template. Returns the traces (pictures/palette.py) of each prompt and its
    answer; they name adapters where these were recorded, as they always are with args.interactive."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    before = [*system, *turns]
    ids = [encode_prompt(mole, p, truncate=args.truncate, before=before) for p in prompts]
    routing = args.routing
    if routing is None:
        routing = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    recording = bool(routing or args.json or args.html or args.svg or args.interactive)
    watch = LinearWeights() if args.html else None
    warn_of_empty(mole, prompts)
    tokens = [[] for _ in prompts]
    answer_traces = [[] for _ in prompts]
    seconds = [0.0] * len(prompts)
    with contextlib.nullcontext() if args.json else Printer(len(prompts), routing) as printer:
        with mole.lock:
            found = retrieve(mole, methods, prompts, args.retrieve, args.exclude, ids)
            compile_for(mole, args.compile, ids, args)
            options = {"retrieved": found, "exclude": args.exclude}
            set_methods(mole, methods, args.top_k, args.gate_temperature, **options)
            for pairs in filter(None, found):
                shown = ", ".join(f"{name} {score:.3f}" for name, score in pairs)
                say(f"retrieved: {shown}")
            begin = time.perf_counter()
            events = decode(mole, ids, args, recording, stops, watch)  # args are a Sampling, too
        seen = next(events) if recording else [[[]] * len(row) for row in ids]
        prompt_tokens = [trace_prompt(mole, row, used) for row, used in zip(ids, seen, strict=True)]
        prompt_traces = list(map(_trace, prompt_tokens))
        if printer:
            printer.begin(prompt_traces)
        for token in events:
            tokens[token.row].append(token)
            answer_traces[token.row].append((token.text, token.adapters))
            seconds[token.row] = time.perf_counter() - begin
            if printer:
                printer.push(token)
    answers = []
    if args.json or args.html:
        for row, prompt in enumerate(prompts):
            took = seconds[row]
            answers.append(result(prompt, methods[row], tokens[row], prompt_tokens[row], took, found[row]))
    if args.json:
        for answer in answers:
            print(json_line(answer, sys.stdout.encoding or "utf-8"), flush=True)
    if args.html:
        write_page(mole, args.html, answers, watch, args.top_k)
    traces = list(zip(prompt_traces, answer_traces, strict=True))
    if args.svg:
        write_text(args.svg, svg_picture(*traces[0]), pipe=True)
    return traces
