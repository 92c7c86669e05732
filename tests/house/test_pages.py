"""README.md and docs/: their commands run or say how long they take, their options exist, their links
lead somewhere, their Python runs. The same for the commands of runs/*.sh."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import eval as evaluation
import generate
import train
from common.options import parse_args
from helpers_commands import ENVIRONMENT, ROOT, repository_copy
from methods.joint import SAMPLING
from tasks.gsm8k import Gsm8kConfig
from tasks.sources import SplitConfig
from tasks.tiny import TinyTasksConfig

PAGES = [ROOT / "README.md", ROOT / "LOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TEST = {"own_adapters.md", "walkthrough.md"}  # test_own_adapters.py and test_walkthrough.py run these
SCRIPTS = {"generate.py": generate.Options, "eval.py": evaluation.Options, "tasks.tiny": TinyTasksConfig}
SCRIPTS |= {"tasks.bbh": SplitConfig, "tasks.bio": SplitConfig, "tasks.gsm8k": Gsm8kConfig}
DURATION = re.compile(r"\s#.*\b(seconds?|\d+ s|min(utes?)?|hours?)\b")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\.\.\.")


def blocks(page):
    """[(language, text)] of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page):
    """The commands of a page as they stand there, a line continued by a backslash joined to its next."""
    found = []
    for language, text in blocks(page):
        if language in ("", "bash", "sh"):
            lines = re.sub(r"\\\n\s*", "", text).splitlines()
            found += [line for line in lines if re.match(r"(python|torchrun|runs/|nanomole-)", line)]
    return found


def check_options(argv):
    """Asserts that the program of `argv`, what stands after `python`, exists and takes its options."""
    rest = list(argv)
    script = rest.pop(0)
    if script == "-m":
        script = rest.pop(0)
        if script == "pytest":
            return
    assert (ROOT / script).exists() or (ROOT / f"{script.replace('.', '/')}.py").exists(), argv
    cls = SCRIPTS.get(script)
    if script in ("train.py", "bench.py"):
        table = (train if script == "train.py" else bench).COMMANDS
        name = rest.pop(0)
        cls = table[name][0]
        if name == "gates" and "--kind" in rest:
            cls = train.KINDS[rest[rest.index("--kind") + 1]].Run
    if cls is None:
        return
    try:
        parse_args(cls, rest, choices={"kind": train.KINDS, "joint": ("", *SAMPLING)})
    except SystemExit:
        pytest.fail(f"{argv}: its error is on stderr")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_in_a_command_exists(page):
    """A page that names an option which is gone sends its readers into an error."""
    for line in commands(page):
        argv = shlex.split(line, comments=True)
        if argv[0] == "python":
            check_options(argv[1:])
        elif argv[0] == "torchrun":
            check_options(argv[argv.index("--") + 1 :])
        elif argv[0].startswith("runs/"):
            assert (ROOT / argv[0]).exists(), line


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda script: script.name)
def test_every_option_in_a_script_exists(script, tmp_path):
    """A script of an hour that nobody runs breaks unseen when an option gets another name. Here it runs
    with programs that do nothing but write their arguments down."""
    stub = tmp_path / "python"
    stub.write_text(
        f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> {tmp_path}/argv\nprintf '\\n\\0' >> {tmp_path}/argv\n"
    )
    stub.chmod(0o755)
    for name in ("cp", "head", "tail"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / script.name).write_text(script.read_text())
    for name in ("out", "out/own_adapters", "out/own_adapters/pool"):
        (tmp_path / name).mkdir()
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = ["bash", tmp_path / "runs" / script.name]
    line += [tmp_path, tmp_path] if "MODEL TASKS" in script.read_text() else []
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = (tmp_path / "argv").read_text().split("\n\0")[:-1]
    ran = [argv.split("\0")[:-1] for argv in ran]
    ours = [argv for argv in ran if argv[0] not in ("-", "-c")]
    assert len(ours) > 3
    for argv in ours:
        check_options(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_runs_or_says_how_long(page):
    """What can't be typed as it stands must at least say what one is in for."""
    if page.name not in OWN_TEST:
        for line in commands(page):
            runs = line.startswith(("python", "torchrun")) and not PLACEHOLDER.search(
                re.sub(r""""[^"]*"|'[^']*'""", "", line)
            )
            assert runs or DURATION.search(line), (
                f"{page.name}: {line}: no test can run it: say how long it takes"
            )


def runnable(page):
    """The commands of a page that say no duration: they run in seconds."""
    if page.name in OWN_TEST:
        return []
    return [line for line in commands(page) if not DURATION.search(line)]


@pytest.mark.slow
@pytest.mark.parametrize("page", filter(runnable, PAGES), ids=lambda page: page.name)
def test_commands_run_as_they_stand(page, tmp_path):
    """Who types a page's command and gets an error goes elsewhere."""
    repository_copy(tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = ENVIRONMENT | {"PATH": path, "PYTHONPATH": ""}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 200}
    for line in runnable(page):
        done = subprocess.run(["bash", "-c", line], **how)
        assert done.returncode == 0, (line, done.stderr)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """A link to a page or heading that was renamed leads nowhere, and nobody tells."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
