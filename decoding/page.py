"""`generate.py --html`: the page of a batch that was answered, with how each method chose."""

from datetime import date
from pathlib import Path

from common.files import write_text
from methods.batch import find_method
from methods.protocol import Gated, Merged, Method, OwnLinears
from methods.session import Mole
from moe_lora import attached
from pictures.page import Shown, html_page
from pictures.page_weights import LinearWeights


def how_chosen(method: Method) -> str:
    """How a method chose among the adapters, a sentence for the page."""
    if not method.needs_adapters:
        return "The base alone answered: no adapter took part."
    if isinstance(method, Gated):  # they decide per "token", per "token and layer" or "token and Linear"
        _, both, place = method.decides.partition("token and ")
        where = f"In each {place}" if both else "For all Linears together"
        return f"{where} a gate weighed the adapters anew for every token."
    alike = "the same for all tokens: nothing was chosen token by token."
    if isinstance(method, Merged):
        return f"One adapter, made before the first token, at weight 1 in every Linear, {alike}"
    if isinstance(method, OwnLinears) and method.edits_W:
        return "The adapters were merged into a copy of the base's weights: no choice was recorded."
    if isinstance(method, OwnLinears):
        return f"One mixture a Linear, made from the whole prompt, {alike}"
    return f"One fixed mixture for the whole request, {alike}"


def write_page(mole: Mole, path: str, answers: list[dict], watched: LinearWeights, top_k: int) -> None:
    """Writes the page of a batch just answered: `answers` as --json prints them, `watched` what its
    Linears used."""
    requests = []
    for row, answer in enumerate(answers):
        linears = watched.of_row(row, len(answer["prompt_tokens"]), len(answer["tokens"]))
        method = find_method(mole, answer["method"], top_k)
        requests.append(Shown(answer, how_chosen(method), linears))
    pool = mole.attached[1] if mole.attached else None
    resident = {pool.slot(name): name for name in pool.resident} if pool else {}
    names = [resident.get(slot, "") for slot in range(pool.capacity if pool else 0)]
    about = {
        "Method": ", ".join(dict.fromkeys(answer["method"] for answer in answers)),
        "Model": _folder_name(mole.base_name),
        "Pool": _folder_name(mole.folder.path) if mole.folder else "none",
        "Date": date.today().isoformat(),
    }
    write_text(path, html_page(requests, names, list(attached(mole.model)), about), pipe=True)


def _folder_name(name):
    """The last part of a folder's path, a hub name as it is."""
    return Path(name).resolve().name if Path(name).is_dir() else str(name)
