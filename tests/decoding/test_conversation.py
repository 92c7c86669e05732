"""System messages and the turns of a conversation: generate.py --chat --system TEXT --interactive."""

import json

import pytest

from common.tokenizer import Tokenizer
from helpers_commands import command
from helpers_models import tokenizer_bytes, write_llama

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content + eos_token }}{% else %}{{ message.role[0] + ': ' + message.content }}"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama with a chat template. Don't write into it."""
    folder = write_llama(tmp_path_factory.mktemp("chat") / "m", max_position_embeddings=211)
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    config = {"chat_template": TEMPLATE, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ask(folder, *args, lines=()):
    """(the objects that --json prints, standard error)."""
    asked = ["--model", folder, "--method", "base", "--json", "--max_new_tokens", 3, *args]
    done = command("generate.py", *asked, stdin="".join(f"{line}\n" for line in lines))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def prompt_ids(row):
    return [token["id"] for token in row["prompt_tokens"]]


def user(text):
    return {"role": "user", "content": text}


def test_turns_accumulate(folder):
    """ "and of fox?" is no question without what was asked and answered before it. What failed is
    not part of the conversation, and /new begins another."""
    lines = ["the fox", "the " * 211, "jumps", "over", "/new", "the dog"]
    rows, errors = ask(folder, "--chat", "--system", "be brief", "--interactive", lines=lines)
    assert len(rows) == 4 and "the context 211" in errors
    tokenizer = Tokenizer(folder)
    messages = [SYSTEM]
    for row, line in zip(rows, ["the fox", "jumps", "over"], strict=False):
        messages.append(user(line))
        assert prompt_ids(row) == tokenizer.encode(tokenizer.chat(messages), start=False)
        messages.append({"role": "assistant", "content": row["text"]})
    again = tokenizer.chat([SYSTEM, user("the dog")])
    assert prompt_ids(rows[3]) == tokenizer.encode(again, start=False)


def test_without_chat_each_prompt_stands_alone(folder):
    """A template of text is for one prompt: earlier ones in front of it are another one."""
    rows, _ = ask(folder, "--raw", "--interactive", lines=["the fox", "the dog"])
    tokenizer = Tokenizer(folder)
    assert list(map(prompt_ids, rows)) == [tokenizer.encode("the fox"), tokenizer.encode("the dog")]


def test_every_prompt_of_a_batch_has_the_system_message(folder):
    """A system message that reaches the first prompt alone, or none, changes answers in silence."""
    rows, _ = ask(folder, "--chat", "--system", "be brief", "--prompt", "the fox", "--prompt", "dog")
    tokenizer = Tokenizer(folder)
    for row, text in zip(rows, ("the fox", "dog"), strict=True):
        chat = tokenizer.chat([SYSTEM, user(text)])
        assert prompt_ids(row) == tokenizer.encode(chat, start=False)
