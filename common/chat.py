"""Chat templates: messages -> a prompt's text, with what transformers offers to a template.

A template is a Jinja program. It comes with a checkpoint and can't be trusted, so it runs in Jinja's
sandbox, which keeps it from files and from Python's insides, and in a limited process, which bounds
its time, its memory and the length of its text.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.files import InputError
from common.limited import LimitedError, call_limited

END = "END_OF_THE_FINAL_MESSAGE "  # its space shows whether the template trims messages


def render(template: str, messages: list[dict[str, Any]], continue_final: bool = False,
           **values) -> str:  # fmt: skip
    """The text of `messages`; `values` are the template's other variables, JSON values as they are.

    With `continue_final` the text ends where the final message's content does, so that the model
    goes on with it. Raises InputError where the template fails.
    """
    said = [{k: v for k, v in message.items() if v is not None} for message in messages]
    final = ""
    if continue_final:
        said[-1], final = _mark_end(said[-1])
    try:
        text = call_limited(_render, template, values | {"messages": said})
    except LimitedError as error:
        raise InputError(f"chat template: {error}") from None
    if not continue_final:
        return text
    before, _, after = text.partition(END.strip())
    if text.count(END.strip()) != 1 or final.strip() not in before:
        raise InputError("chat template: it changes the final message, which is to be continued")
    return before if after.startswith(" ") else before.rstrip()


def _mark_end(message):
    """The message with END after its content, a text or a list of blocks; and that text alone."""
    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": content + END}, content
    last = content[-1] if content and isinstance(content, list) else None
    if not isinstance(last, dict) or not isinstance(last.get("text"), str):
        raise InputError("chat template: the final message has no text to continue")
    marked = last | {"text": last["text"] + END}
    return message | {"content": [*content[:-1], marked]}, last["text"]


# In the limited process ---------------------------------------------------------------------------


def _render(template, values):
    return _compile(template).render(values)


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    extensions = [Generation, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox.from_string(template)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks, for training, what the assistant said; to a
    prompt it means nothing. As in transformers its body is a scope of its own."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        """The template's statements up to endgeneration."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own filter escapes <, >, & and '."""
    form = {"ensure_ascii": ensure_ascii, "indent": indent}
    return json.dumps(value, **form, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise TemplateError(message)


def _strftime_now(form):
    return datetime.now().strftime(form)
