"""docs/walkthrough.md: its Python runs and prints what the page shows, its quotes are the code's."""

import re

from helpers_commands import ROOT, command, python

PAGE = ROOT / "docs" / "walkthrough.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
SESSION = "\n".join(text for language, text in BLOCKS if language == "pycon")
RUN = """
import doctest, sys
session = doctest.DocTestParser().get_doctest(sys.argv[1], {}, "docs/walkthrough.md", None, 0)
failed, run = doctest.DocTestRunner(verbose=False).run(session)
print(run, "examples,", failed, "failed")
"""


def missing_lines(quote, text):
    """The first lines of a quote that don't stand in `text` as they are, after those before them;
    `...` on a line by itself stands for lines left out. Empty where the quote is true."""
    start = 0
    for run in re.split(r"^\.\.\.\n", quote, flags=re.MULTILINE):
        found = f"\n{text}".find(f"\n{run}", start)
        if found < 0 or not run:
            return run or "..."
        start = found + len(run)
    return ""


def test_the_page_prints_what_it_shows():
    """Who follows the page and sees other numbers stops believing it, and a renamed function would
    end it in a traceback."""
    done = python(f"import sys; sys.argv = ['', {SESSION!r}]\n{RUN}", cwd=ROOT)
    count = SESSION.count(">>> ")
    assert done.stdout == f"{count} examples, 0 failed\n", done.stdout + done.stderr
    assert count > 50


def test_the_command_prints_what_the_page_shows():
    """The page begins with a command, and explains what that command computes."""
    (line,) = (text for language, text in BLOCKS if language == "bash")
    (shown,) = (text for language, text in BLOCKS if language == "text")
    prompt = re.fullmatch(r'python generate\.py --prompt "(.*)"\n', line)[1]
    assert f'>>> prompt = "{prompt}"\n' in SESSION
    done = command("generate.py", "--prompt", prompt)
    assert done.stderr + done.stdout == shown


def test_quotes_are_the_code():
    """A quote of code that has changed since teaches what is no longer so."""
    quotes = [text for language, text in BLOCKS if language == "python"]
    for quote in quotes:
        first, _, lines = quote.partition("\n")
        text = (ROOT / first.removeprefix("# ")).read_text("utf-8")
        assert missing_lines(lines, text) == "", first
    assert len(quotes) >= 2


def test_a_wrong_quote_is_found():
    """Without it a comparison that finds every quote true looks like a page without mistakes."""
    text = "def f():\n    a = 2\n    b = 3\n    return a\n"
    for quote in ("    a = 2\n    b = 3\n", "    a = 2\n...\n    return a\n"):
        assert missing_lines(quote, text) == ""
    for quote in ("    a = 5\n", "a = 2\n", "    a = 2\n    return a\n", "    b = 3\n...\n    a = 2\n"):
        assert missing_lines(quote, text) != ""


def test_every_block_is_checked():
    """A block of another kind would stand on the page unchecked."""
    assert {language for language, _ in BLOCKS} == {"bash", "text", "python", "pycon"}
    assert PAGE.read_text("utf-8").count("```") == 2 * len(BLOCKS)
    for path in re.findall(r"\]\(([^)#]+)", PAGE.read_text("utf-8")):
        if path.startswith("../"):
            assert (PAGE.parent / path).exists(), path
