"""The routing of a batch as one web page that needs no other file."""

import html

from pictures.palette import GREY, Palette, Trace, key


def _html_span(role, text, adapters, colour):
    tip = ", ".join(f"{name} {weight:.2f}" for name, weight in adapters)
    style = f'class="{role}" style="--c:rgb{colour}" title="{html.escape(tip, quote=True)}"'
    return f"<span {style}>{html.escape(text)}</span>"


def html_page(traces: list[tuple[Trace, Trace]], title: str) -> str:
    """A page that needs no other file; `traces`: (prompt trace, answer trace) of each request."""
    palette = Palette.of(trace for pair in traces for trace in pair)
    body = ""
    for pair in traces:
        body += "<pre>"
        for role, trace in zip(("prompt", "answer"), pair, strict=True):
            for text, adapters in trace:
                body += _html_span(role, text, adapters, palette.colour(adapters) or GREY)
        body += "</pre>"
    keys = []
    for name, colour, share in palette.shares():
        keys.append(f'<b style="--c:rgb{colour}">{html.escape(key(name, share))}</b>')
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>'
        "body{font:16px system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
        "pre{white-space:pre-wrap;font:15px/1.7 ui-monospace,monospace}"
        "span{border-bottom:3px solid var(--c)}span.prompt{opacity:.55}"
        "b{color:var(--c);margin-right:1em}"
        f"</style><h1>{title}</h1>{body}<p>{' '.join(keys)}</p></html>\n"
    )
