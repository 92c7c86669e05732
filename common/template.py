"""How a prompt is wrapped before the model sees it, and who says so.

A template is a text that holds {prompt}, or the word "chat": the tokenizer's chat template, with
the prompt as the user's message. Adapters answer well under the template that they were trained
with and, in most cases, badly under any other; pool.json keeps it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.fields import check
from common.files import InputError
from common.printable import shown
from common.tokenizer import Tokenizer

CHAT = "chat"
RAW = "{prompt}"  # the prompt as it is
TEMPLATE = "[INST] {prompt} [/INST]\n"  # MeteoRA's


@dataclass
class TemplateOptions:
    """The options that say how prompts are wrapped."""

    template: str = ""  # how a prompt is wrapped, {prompt} in it; default: as pool.json says
    chat: bool = False  # wrap prompts by the tokenizer's chat template
    raw: bool = False  # leave prompts as they are


def asked_template(args: TemplateOptions) -> str:
    """The template that the options ask for, "" for none. Raises InputError."""
    asked = {"--template": args.template, "--chat": args.chat, "--raw": args.raw}
    given = [name for name, value in asked.items() if value]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other")
    if args.template:
        check_template(args.template, "--template")
    return args.template or (CHAT if args.chat else RAW if args.raw else "")


def check_template(template: object, where: str) -> None:
    """Raises InputError, which begins with `where`, for what is no template."""
    if not isinstance(template, str) or (RAW not in template and template != CHAT):
        expected = 'a text that holds {prompt}, or "chat"'
        raise InputError(f"{where}: template is {shown(template)}, expected {expected}")
    check(f"{where}: template", template, str)


def choose_template(
    asked: str, stored: str | None, tokenizer: Tokenizer, default: str = ""
) -> tuple[str, str]:
    """(The template in use, where it comes from, in words): the first that there is of the one
    `asked` for, the one `stored` in pool.json, the `default`, the tokenizer's chat template; RAW
    where there is none.

    Raises InputError where the tokenizer's is asked for or stored, and it has none.
    """
    has_chat = "default" in tokenizer.chat_templates
    template = asked or stored
    if template == CHAT and not has_chat:
        where = "--chat" if asked else "pool.json's template"
        raise InputError(f"{where}: this tokenizer has no chat template: use --template TEXT or --raw")
    if template:
        return template, "as asked" if asked else "from pool.json"
    if default:
        return default, "the default; --chat or --template TEXT change it"
    if has_chat:
        return CHAT, "assumed, as the tokenizer has a chat template; --raw or --template TEXT change it"
    return RAW, "assumed, as no pool.json says another; --template TEXT changes it"


def fill(template: str, prompt: str) -> str:
    """The prompt within a template that is a text. Not str.format: prompts may hold braces. Raises
    InputError for the chat template, which can't stand inside of a longer text."""
    if template == CHAT:
        raise InputError("composite prompts need a template that is a text: use --template TEXT")
    return template.replace(RAW, prompt)


def encode_wrapped(
    tokenizer: Tokenizer, template: str, prompt: str, before: Sequence[dict] = ()
) -> list[int]:
    """The wrapped prompt -> token ids. With the chat template the messages `before` come first."""
    if template == CHAT:
        messages = [*before, {"role": "user", "content": prompt}]
        return tokenizer.encode(tokenizer.chat(messages), start=False)
    return tokenizer.encode(fill(template, prompt))
