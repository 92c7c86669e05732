"""The prompt loop: /route, the history of a terminal, Ctrl-C, and mistakes that must not end it."""

import errno
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from common import history
from generate import load, stream
from helpers_commands import ENVIRONMENT, ROOT, command
from helpers_models import write_adapters, write_llama
from helpers_terminal import OUTPUT, Terminal
from model import load_llama
from pictures.heat_map import heat_map


@pytest.fixture(scope="module")
def folders(small_model, tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("loop"), load_llama(small_model), ["one", "two"])


def ask(model, folders, *lines, **options):
    args = ["--model", model, "--interactive", "--max_new_tokens", "5", "--method", "mix:one=0.25,two=1"]
    for name, folder in folders.items():
        args += ["--adapter", f"{name}={folder}"]
    done = command("generate.py", *args, stdin="".join(f"{line}\n" for line in lines), **options)
    assert done.returncode == 0, done.stderr
    return done


def test_route(small_model, folders):
    """Without it the map is of another answer, or lacks weights, as nothing was recorded: standard
    output is no terminal here."""
    done = ask(small_model, folders, "/route", "the quick fox", "the lazy dog", "/route")
    assert "error: no answer yet" in done.stderr
    shown = done.stdout[done.stdout.index("prompt ") :].splitlines()
    mole = load(small_model, adapters=folders)
    asked = {"method": "mix:one=0.25,two=1", "max_new_tokens": 5, "routing": True}
    answer = [(token.text, token.adapters) for token in stream(mole, "the lazy dog", **asked)]
    assert shown[-4:] == heat_map([], answer).splitlines()  # each token has the same shares
    assert shown[-4].startswith("answer") and "▂" in shown[-2] and "█" in shown[-3]
    assert "dog" in shown[0]


def test_mistakes_end_no_loop(small_model, folders):
    """Without it a path that the system refuses to look at is an OSError that ends the session."""
    name = "x" * 300
    lines = [f"/add a={name}", f"/add b={ROOT / 'README.md'}", f"/add one={folders['one']}"]
    done = ask(small_model, folders, *lines, f"/add one={folders['two']}", "the fox", "/route")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and f"{name}: {os.strerror(errno.ENAMETOOLONG)}" in errors[0], errors
    assert "here already" in errors[2] and "differs" in errors[3] and "/remove one" in errors[3]
    assert "answer" in done.stdout


# On a terminal ------------------------------------------------------------------------------------


def interactive(state, model, *args):
    line = ["--model", model, "--method", "base", "--no-routing", "--interactive", *args]
    return Terminal(state, ROOT / "generate.py", *line)


def test_history_of_a_terminal(small_model, tmp_path):
    """Without it a long question has to be typed anew; arrow keys write ^[[A into it."""
    for turn, keys in enumerate(("the fox\n", "\x1b[A dog\n")):
        terminal = interactive(tmp_path, small_model, "--max_new_tokens", "3")
        try:
            terminal.wait_for("> ")
            terminal.type(keys)
            terminal.wait_for("> ")
            terminal.type("\x04")  # Ctrl-D
            assert terminal.process.wait(OUTPUT) == 0
        finally:
            terminal.close()
        kept = (tmp_path / "nanomole" / "history").read_text().splitlines()
        assert kept == ["the fox", "the fox dog"][: 1 + turn]


def test_tab_completes_names(small_model, folders, tmp_path):
    """Without it a name of forty characters has to be copied from the list of adapters."""
    terminal = interactive(tmp_path, small_model, "--adapter", f"a-long-name={folders['two']}")
    try:
        terminal.wait_for("> ")
        terminal.type("/rem\t a-l\t\n")
        terminal.wait_for("> ")
        terminal.type("/adapters\n")
        terminal.wait_for("no adapters")
    finally:
        terminal.close()


def test_the_history_is_cut_and_its_errors_are_none(tmp_path):
    """Without it the file grows for ever, or a home that can't be written ends the session in a
    traceback."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import readline; assert not readline.get_current_history_length()\n"
        "from common.history import line_history\n"
        "with line_history(list):\n"
        "    for j in range(1013): readline.add_history(f'line {j}')\n"
        "print('done')"
    )
    for state in (tmp_path / "fresh", ROOT / "README.md"):
        terminal = Terminal(state, "-c", code)
        try:
            assert "Traceback" not in terminal.wait_for("done")
            assert terminal.process.wait(OUTPUT) == 0
        finally:
            terminal.close()
    kept = (tmp_path / "fresh" / "nanomole" / "history").read_text().splitlines()
    assert kept == [f"line {j}" for j in range(13, 1013)]


def test_where_the_history_is(monkeypatch, tmp_path):
    """Without it a relative XDG_STATE_HOME, which its specification tells programs to ignore, scatters
    files over working directories."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for state, want in (
        (str(tmp_path / "state"), tmp_path / "state" / "nanomole" / "history"),
        ("relative", tmp_path / ".local" / "state" / "nanomole" / "history"),
        ("", tmp_path / ".local" / "state" / "nanomole" / "history"),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert history.history_file() == want


def test_a_python_without_readline_has_no_history(monkeypatch, tmp_path):
    """Without it a Python that was built without readline has no prompt loop."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setitem(sys.modules, "readline", None)  # import readline raises ImportError
    with history.line_history(list):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_has_no_history(small_model, tmp_path):
    """Without it a script's questions end among those that somebody typed."""
    args = [ROOT / "generate.py", "--model", small_model, "--interactive"]
    environment = ENVIRONMENT | {"XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, *args], input=b"/help\n", capture_output=True, env=environment)
    assert done.returncode == 0 and b"/route" in done.stdout and list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_answers_line(small_model, tmp_path):
    """Without it the next answer begins in the middle of the one that was stopped."""
    folder = write_llama(tmp_path / "m", max_position_embeddings=99991, eos_token_id=None)
    (folder / "tokenizer.model").write_bytes((small_model / "tokenizer.model").read_bytes())
    args = ["--model", folder, "--interactive", "--method", "base", "--no-compile"]
    line = [sys.executable, ROOT / "generate.py", *args, "--max_new_tokens", "90001"]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # nohup's ignore it
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(line, env=ENVIRONMENT, **pipes, **heard)
    try:
        process.stdin.write(b"the fox\n")
        process.stdin.flush()
        assert process.stdout.read(3)  # it is answering now
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/adapters\n/quit\n", timeout=OUTPUT)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and err.decode().splitlines()[2:] == ["stopped"], err
    assert out.endswith(b"\nno adapters\n")
