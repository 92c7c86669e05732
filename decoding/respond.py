"""Answers a batch as the command does: text as it streams, lines of JSON, a web page."""

import json
import os
import sys
import time
from dataclasses import fields

from common.files import write_text
from common.pictures import Printer, html_page
from common.tokenizer import TextStream
from decoding.loop import decode
from decoding.prompts import encode_prompt
from decoding.sampling import Sampling
from decoding.stream import compile_for
from methods.batch import retrieve, set_methods


def result(prompt, method, tokens, prompt_trace, seconds, retrieved):
    """The JSON object of one answer; its tokens' texts joined are its text."""
    kept = [{"id": t.id, "text": t.text, "adapters": t.adapters} for t in tokens if t.finish != "eos"]
    if kept and tokens[-1].finish == "eos":  # a character that the EOS cut short
        kept[-1]["text"] += tokens[-1].text
    return {
        "prompt": prompt,
        "text": "".join(t.text for t in tokens),
        "method": method,
        "finish_reason": tokens[-1].finish,
        "tokens": kept,
        "prompt_tokens": prompt_trace,
        "retrieved": retrieved,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(tokens) / seconds, 2),
    }


def trace_prompt(mole, ids, adapters):
    """A prompt's tokens as JSON wants them."""
    texts = TextStream(mole.tokenizer)
    rows = [{"id": i, "text": texts.push(i), "adapters": a} for i, a in zip(ids, adapters, strict=True)]
    rows[-1]["text"] += texts.flush()
    return rows


def respond(mole, prompts, methods, args):
    """Decodes a batch and shows it as asked: streamed text, JSON lines, a web page."""
    ids = [encode_prompt(mole, prompt, args.raw, args.chat, args.truncate) for prompt in prompts]
    found = retrieve(mole, methods, prompts, args.retrieve, args.exclude, ids)
    compile_for(mole.model, args.compile, args.max_new_tokens)
    set_methods(mole, methods, args.top_k, args.gate_temperature, retrieved=found, exclude=args.exclude)
    for pairs in found:
        if pairs:
            print("retrieved: " + ", ".join(f"{name} {score:.3f}" for name, score in pairs), file=sys.stderr)
    routing = sys.stdout.isatty() and "NO_COLOR" not in os.environ if args.routing is None else args.routing
    recording = bool((routing and not args.json) or args.json or args.html)
    begin = time.perf_counter()
    tokens = [[] for _ in prompts]
    seconds = [0.0] * len(prompts)
    events = decode(mole, ids, Sampling(*(getattr(args, f.name) for f in fields(Sampling))), recording)
    seen = next(events) if recording else [[[]] * len(row) for row in ids]
    prompt_traces = [trace_prompt(mole, row, adapters) for row, adapters in zip(ids, seen, strict=True)]
    pairs = [[(t["text"], t["adapters"]) for t in trace] for trace in prompt_traces]
    printer = None if args.json else Printer(prompts, pairs, routing)
    for token in events:
        tokens[token.row].append(token)
        seconds[token.row] = time.perf_counter() - begin
        if printer:
            printer.push(token)
    if printer:
        printer.close()
    if args.json:
        for row, prompt in enumerate(prompts):
            line = result(prompt, methods[row], tokens[row], prompt_traces[row], seconds[row], found[row])
            print(json.dumps(line, ensure_ascii=False), flush=True)
    if args.html:
        answers = [[(t.text, t.adapters) for t in row] for row in tokens]
        write_text(
            args.html, html_page(list(zip(pairs, answers, strict=True)), "Which adapter computed which token")
        )
