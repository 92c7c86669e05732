"""The routing of a batch as one web page to explore; it needs no other file.

page.html.jinja is the page, page.css and page.js go into it. Texts and names pass through Jinja's
escaping, the data through its tojson filter, so that neither can become markup or a script. Hidden
characters are shown as their escapes: HTML allows few of them, and some reorder the text around them.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.printable import in_lines
from pictures.page_weights import Heaviest, pack
from pictures.palette import GREY, Palette, heaviest

HERE = Path(__file__).parent


@dataclass
class Shown:
    """A request as the page shows it."""

    answer: dict  # the object that --json prints
    how: str  # a sentence on how its method chose
    linears: Heaviest  # of its prompt's tokens and then its answer's

    @property
    def tokens(self) -> list[dict]:
        """Its prompt's tokens and then its answer's: {"text", "adapters"} each."""
        return [*self.answer["prompt_tokens"], *self.answer["tokens"]]


def html_page(requests: list[Shown], names: list[str], paths: list[str], about: dict[str, str]) -> str:
    """`names`: the adapter in each of the e slots, "" for none; `paths`: of the m gated Linears;
    `about`: what stands at the top, label and text."""
    tokens = [token for request in requests for token in request.tokens]
    slots = {name: slot for slot, name in enumerate(names) if name}
    palette = Palette.of([*(_trace(request.tokens) for request in requests), _every(slots)])
    for token in tokens:
        palette.colour(token["adapters"])
    return _template().render(
        about=about,
        requests=[_request(request, slots) for request in requests],
        count=len(tokens),
        looks=[(slots[name], colour, palette.style(name)) for name, colour, _ in palette.shares()],
        grey=GREY,
        legend=_legend(palette, slots, tokens),
        ess=_mean_ess(requests),
        below_zero=any(request.linears.below_zero for request in requests),
        data=_data(requests, tokens, slots, names, paths),
        style=(HERE / "page.css").read_text("utf-8"),
        script=(HERE / "page.js").read_text("utf-8"),
    )


def _template():
    env = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
                      finalize=_without_hidden)  # fmt: skip
    env.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return env.get_template("page.html.jinja")


def _without_hidden(value):
    """What an expression of the template gives, as it goes into the page."""
    return in_lines(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _trace(tokens):
    return [(token["text"], token["adapters"]) for token in tokens]


def _every(slots):
    """A trace that names every adapter at no weight: those that weigh little get a look, too."""
    return [("", [[name, 0.0] for name in slots])]


def _request(request, slots):
    """What the template shows: each token as its text and its heaviest adapter's slot."""
    parts = []
    for label, field in (("Prompt", "prompt_tokens"), ("Answer", "tokens")):
        tokens = request.answer[field]
        parts.append((label, [(token["text"], _leader(token, slots)) for token in tokens]))
    ess = _mean_ess([request])
    return {"method": request.answer["method"], "how": request.how, "ess": ess, "parts": parts}


def _mean_ess(requests):
    """Over the tokens that use an adapter, 0 where none does."""
    ess = [number for request in requests for number in request.linears.ess.tolist() if number]
    return sum(ess) / max(len(ess), 1)


def _leader(token, slots):
    """The slot of a token's heaviest adapter, None where none is active or several are equal."""
    return slots.get(heaviest(token["adapters"]))


def _legend(palette, slots, tokens):
    """The adapters that took part, heaviest first, each with its total and how many
    tokens it leads."""
    leaders = [_leader(token, slots) for token in tokens]
    total = sum(weight for token in tokens for _, weight in token["adapters"])
    rows = []
    for name, _, share in palette.shares():
        if share > 0:
            slot = slots[name]
            row = {"slot": slot, "label": f"{name} {share:.0%}", "total": share * total}
            rows.append(row | {"leads": leaders.count(slot)})
    return rows


def _data(requests, tokens, slots, names, paths):
    """What page.js reads. A token is [100 ESS, [slot, 1000 weight, ...] averaged over the Linears,
    base64 of pack()'s bytes]."""
    packed, k, unit = pack([request.linears for request in requests], len(names))
    ess = [value for request in requests for value in request.linears.ess.tolist()]
    rows = []
    for token, number, data in zip(tokens, ess, packed, strict=True):
        pairs = [(slots[name], round(1000 * weight)) for name, weight in token["adapters"]]
        flat = [value for pair in pairs for value in pair]
        rows.append([round(100 * number), flat, base64.b64encode(data).decode()])
    linears = [_layer_and_module(path) for path in paths]
    form = {"names": list(map(in_lines, names)), "linears": linears, "k": k, "unit": unit}
    return form | {"tokens": rows}


def _layer_and_module(path):
    """model.layers.3.self_attn.q_proj -> (3, "q")"""
    layer = re.search(r"\.(\d+)\.", path)
    return int(layer[1]), path.rpartition(".")[2].removesuffix("_proj")
