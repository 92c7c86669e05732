"""The shape of the project: who may import whom, nothing at import, help for every option, honest
requirements."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from typing import get_type_hints

import pytest

from common.files import InputError
from common.options import BOUNDS, build_parser, numbers_of, parse_args
from helpers_commands import ROOT, command
from methods.batch import method_names

# From the bottom up: a file imports only files of its own room and of rooms above it in this list.
ORDER = [
    "common",
    "model",
    "kernels",
    "moe_lora",
    "fast",
    "pictures",
    "pool",
    "tasks",
    "parallel",
    "training",
]
ORDER += ["methods", "decoding", "evaluation", "commands", "examples", "docs"]
SCRIPTS = {"generate", "train", "eval", "bench"}
CORE = {"model": {"common"}, "kernels": set(), "moe_lora": {"kernels"}}  # and the rooms that each may import
SPEED = ["is_compiling", "mark_dynamic", "mkldnn", "is_cuda", "device.type", "is_amx"]
SPEED += ["compile", "captur", "processor"]
ROOMS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))
FILES = [*ROOT.glob("*.py"), *(file for file in ROOT.glob("*/*.py") if file.parent.name in ROOMS)]
FILES = [file for file in FILES if file.stem != "__init__"]
FILES += sorted((ROOT / "docs").glob("*.py"))  # scripts beside the pages that they write
MODULES = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES)
PEERS = {"transformers", "peft", "llama_cpp"}  # which bench.py times beside this, through evaluation/peers.py
OPTIONAL = {"sacrebleu", "rouge_score", "matplotlib", "tensorboard", "huggingface_hub"}
OPTIONAL |= {"sentence_transformers", *PEERS}
ORACLES = {"transformers", "peft", "accelerate", "datasets"}
# Dataclasses that are command lines: script and command -> class.
COMMANDS = {
    ("generate.py",): "Options", ("train.py", "base"): "BaseRun", ("train.py", "adapters"): "AdaptersRun",
    ("train.py", "gates"): "MeteoraRun", ("train.py", "lorahub"): "LorahubRun", ("eval.py",): "Options",
    ("train.py", "retriever"): "RetrieverRun", ("train.py", "router"): "RouterRun",
    ("train.py", "drlora"): "DRLoRARun",
    ("train.py", "samora"): "SamoraRun",
    ("tasks/tiny.py",): "TinyTasksConfig", ("tasks/bio.py",): "SplitConfig", ("tasks/bbh.py",): "SplitConfig",
    ("tasks/gsm8k.py",): "Gsm8kConfig", ("bench.py", "layer"): "LayerBench",
    ("bench.py", "decode"): "DecodeBench", ("bench.py", "prefill"): "PrefillBench",
    ("bench.py", "train"): "TrainBench", ("bench.py", "methods"): "MethodsBench",
    ("bench.py", "split"): "SplitBench", ("bench.py", "cache"): "CacheBench",
}  # fmt: skip


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


def tree(module):
    return ast.parse(path_of(module).read_text("utf-8"))


def imports(nodes):
    """What the nodes import: modules of ours as {"common.files", ...}, of others the top-level name
    {"torch", ...}."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {ours_or_top(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports: a file can be read alone"
            found |= {ours_or_top(node.module, alias.name) for alias in node.names}
    return found


def ours_or_top(module, name=""):
    """("common", "files") -> "common.files", ("pool.adapters", "Pool") -> "pool.adapters",
    ("torch",) -> "torch"."""
    known = [path for path in (f"{module}.{name}", module) if path in MODULES]
    return known[0] if known else module.partition(".")[0]


def all_imports(module):
    """Also those inside functions and those by importlib.import_module("...")."""
    nodes = list(ast.walk(tree(module)))
    calls = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "import_module"]
    texts = {ours_or_top(a.value) for c in calls for a in c.args if isinstance(a, ast.Constant)}
    return imports(nodes) | texts


def room_of(module):
    """The place in ORDER of a module, of a script "commands"."""
    room = module.partition(".")[0]
    return "commands" if room in SCRIPTS else room


def ours(module):
    """The modules of ours that a module imports."""
    return {name for name in all_imports(module) if name in MODULES or name in ROOMS}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_upwards(module):
    """Without it model.py comes to know of LoRA, two rooms need each other, and none can be read
    alone."""
    # A new room needs a line in ORDER: which rooms may it build on?
    assert room_of(module) in ORDER
    above = set(ORDER[: ORDER.index(room_of(module)) + 1])
    commands = SCRIPTS if room_of(module) != "examples" else set()
    below = {name for name in ours(module) if room_of(name) not in above or name in commands}
    assert not below, f"{module} imports {sorted(below)}, which stand below it"


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_need_no_circle(room):
    """Two files that import each other can't be read one after the other."""
    files = {module: ours(module) for module in MODULES if module.startswith(f"{room}.")}
    while files:
        free = [module for module, needs in files.items() if not needs & files.keys() - {module}]
        assert free, f"in a circle: {sorted(files)}"
        for module in free:
            del files[module]


def test_the_root_holds_the_idea_and_the_commands():
    """Without it the files that teach lie in a heap again."""
    assert {file.stem for file in ROOT.glob("*.py")} == {*CORE, *SCRIPTS}


@pytest.mark.parametrize("module", CORE)
def test_the_idea_stands_alone(module):
    """A learner who meets compilers and caches in the three files has to read twice as much to see
    what LoRA routing is."""
    assert {room_of(name) for name in ours(module)} <= CORE[module]
    text = path_of(module).read_text("utf-8")
    assert [word for word in SPEED if word in text] == []


def test_speed_comes_from_outside():
    """Without it the program comes to need fast/, and what it changes is no longer in one place."""
    users = {module for module in MODULES if any(room_of(name) == "fast" for name in ours(module))}
    assert {module for module in users if room_of(module) != "fast"} == {"pool.load", "bench"}
    tried = [node for node in ast.walk(tree("pool.load")) if isinstance(node, ast.Try)]
    assert any("fast" in imports(node.body) for node in tried)


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) != "methods"])
def test_only_methods_know_their_names(module):
    """Without it one more method takes an edit in every file that compares a name with a literal."""
    names = set(method_names()) - {"base"}  # base is also a command of train.py
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & names
            where = f"{module}:{node.lineno}"
            assert not found, f"{where} compares with {sorted(found)}: what of the method decides?"


@pytest.mark.parametrize("module", MODULES)
def test_written_from_scratch(module):
    """Without it a convenient import makes the project a wrapper of the libraries that its tests
    compare it with. evaluation/peers.py is there to time them."""
    assert not all_imports(module) & ORACLES or module == "evaluation.peers"


def test_oracles_are_not_needed(small_model):
    """Without it a library that torch or tokenizers would import in passing could become needed
    unseen."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(ORACLES)!r}))\n"
        f"import generate; mole = generate.load({str(small_model)!r})\n"
        "print(len(generate.answer(mole, 'the fox')))"
    )
    done = python(code)
    assert done.returncode == 0 and done.stdout.strip().isdigit(), done.stderr


def python(code):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    line = [sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=100)


def test_no_file_shadows_a_library():
    """Without it a file beside the scripts hides a library of its name: a script's folder comes
    first on sys.path."""
    libraries = {"tokenizers", "peft", "datasets", "evaluate"} | requirements().keys()
    libraries |= set(sys.stdlib_module_names)
    assert not {*ROOMS, *(file.stem for file in ROOT.glob("*.py"))} & libraries


IMPORT_ALL = """
import contextlib, io, os, random, signal, sys, threading
import numpy, torch
def state():
    return {"threads": threading.active_count(), "folder": os.getcwd(), "environment": dict(os.environ),
            "files": sorted(os.listdir()), "path": list(sys.path), "argv": list(sys.argv),
            "random": random.getstate(), "torch random": torch.get_rng_state().tolist(),
            "numpy": str(numpy.random.get_state()), "dtype": torch.get_default_dtype(),
            "grad": torch.is_grad_enabled(), "torch threads": torch.get_num_threads(),
            "matmul": torch.backends.mkldnn.matmul.fp32_precision,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]}
for name in sys.argv[1:]:
    before = state()
    __import__(name)
    for key, value in state().items():
        if value != before[key]:
            print(name, "changes", key)
"""


def test_importing_has_no_effects(tmp_path):
    """Without it `import generate` in somebody's notebook reads the command line, seeds or prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", IMPORT_ALL, *MODULES]
    quiet = {"capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(line, cwd=tmp_path, env=environment, **quiet)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_help_explains_every_option(line):
    """Without it --help is a traceback, or an option stands there without a word on what it does."""
    module = import_module(line[0].removesuffix(".py").replace("/", "."))
    cls = module.COMMANDS[line[1]][0] if line[0] == "train.py" else getattr(module, COMMANDS[line])
    assert cls.__name__ == COMMANDS[line]
    done = command(*line, "--help")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shown = re.sub(r"\s+", "", done.stdout)
    actions = {action.dest: action for action in build_parser(cls, "test")._actions}
    for field in fields(cls):
        text = actions[field.name].help.replace("%%", "%")
        comment = re.sub(r"\s*\(default: .*\)$", "", text)
        assert comment, f"{cls.__name__}.{field.name} has no comment beside it"
        option = field.name.upper() if field.metadata else f"--{field.name.rstrip('_')}"
        assert {option, f"{option},"} & set(done.stdout.split())
        assert re.sub(r"\s+", "", text) in shown, field.name


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_every_number_has_bounds_of_its_own(line):
    """Without it an option of 10**30 or of -1 fails far from the command line, hangs or fills the
    memory."""
    module = import_module(line[0].removesuffix(".py").replace("/", "."))
    cls = module.COMMANDS[line[1]][0] if len(line) > 1 else module.__dict__[COMMANDS[line]]
    kinds = get_type_hints(cls)
    bounds = numbers_of(cls)
    for field in fields(cls):
        if kinds[field.name] in (int, float, int | None, float | None):
            assert bounds[field.name] not in BOUNDS.values(), f"{cls.__name__}.{field.name} has no bounds"
            for text in ("1" + "0" * 30, "1e400", "nan", "-inf", "²", "1" * 5000, "-1"):
                with pytest.raises(InputError, match=f"^--{field.name} is .*, expected "):
                    parse_args(cls, [f"--{field.name}={text}"])
        elif kinds[field.name] is str and field.name in bounds:
            with pytest.raises(InputError, match=f"^--{field.name} is .*, expected (whole )?numbers "):
                parse_args(cls, [f"--{field.name}=1,1e400"])


TESTS = sorted((ROOT / "tests").rglob("*.py"))
TESTS = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in TESTS]


@pytest.mark.parametrize("module", [*MODULES, *TESTS])
def test_first_line_says_what_it_is(module):
    """Without it a reader opens a file and has to infer from its code what it is for."""
    assert (ast.get_docstring(tree(module)) or "").strip()
    first = path_of(module).read_text("utf-8").splitlines()[0]
    assert re.fullmatch(r'""".{20,}', first), first


def requirements():
    """{package: the rest of its line} of requirements.txt."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", line)
            found[match[1].lower().replace("-", "_")] = match[2]
    return found


def test_requirements_name_what_is_imported():
    """Without it a fresh environment fails at the first import, or installs what nobody uses."""
    named = requirements().keys()
    ours, standard = {*MODULES, *ROOMS}, set(sys.stdlib_module_names)
    needed = set().union(*(imports(tree(module).body) for module in MODULES)) - ours - standard
    inside = set().union(*(all_imports(module) for module in MODULES)) - ours - standard
    assert needed <= named, f"imported at the top of a file but not named: {sorted(needed - named)}"
    assert needed.isdisjoint(OPTIONAL), "optional libraries are imported where they are used"
    assert inside <= named | OPTIONAL | {"jinja2"}, sorted(inside - named - OPTIONAL)  # torch brings jinja2
    assert named <= inside | {"jinja2"}, f"named but not imported: {sorted(named - inside)}"


def test_requirements_bound_torch():
    """Without it pip takes a torch that nobody tried these files with."""
    assert re.search(r">=\s*2\.\d+", requirements()["torch"]) and "<" in requirements()["torch"]
