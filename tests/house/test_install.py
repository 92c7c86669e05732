"""pip install -e, and packages that have the name of a file here."""

import subprocess
import sysconfig
import venv

import pytest

from helpers_commands import ROOT, python

# Any name that somebody imports from it: a class whose objects are decorators that change nothing.
STAND_IN = """
def __getattr__(name):
    return type(name, (), {"__init__": lambda self, *args, **options: None, "__call__": lambda self, x: x})
"""


def write_kernels(folder):
    """A package `kernels` of the version that transformers looks for, as Hugging Face's would lie
    in site-packages."""
    version = "from transformers.utils.import_utils import KERNELS_MIN_VERSION; print(KERNELS_MIN_VERSION)"
    version = python(version).stdout.split()[-1]
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(STAND_IN)
    (folder / f"kernels-{version}.dist-info").mkdir()
    (folder / f"kernels-{version}.dist-info" / "METADATA").write_text(f"Name: kernels\nVersion: {version}\n")


def test_peers_find_the_package_kernels_and_we_our_file(tmp_path):
    """transformers would import its names from kernels.py and fail; or bench.py the operation from
    the package."""
    write_kernels(tmp_path)
    code = f"""
import sys
sys.path.append({str(tmp_path)!r})
import torch
from evaluation.peers import hf_llama
print(type(hf_llama({str(ROOT / "tiny")!r}, torch.float32)).__name__)
from transformers.utils import is_kernels_available
import kernels
print(is_kernels_available(), kernels.__file__)
"""
    done = python(code)
    assert done.stdout.split() == ["LlamaForCausalLM", "True", str(ROOT / "kernels.py")], done.stderr


@pytest.mark.slow
def test_an_installed_checkout_answers_from_anywhere(tmp_path):
    """`pip install -e .` must know every room, and its commands find our kernels.py before a
    package of that name."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (tmp_path / "nano" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nano" / name).write_bytes((ROOT / name).read_bytes())
    venv.create(tmp_path / "env", with_pip=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    libraries = sysconfig.get_paths()["purelib"]  # torch and the others, as they are here
    (site / "here.pth").write_text(f"{libraries}\n")
    write_kernels(site)
    pip = [tmp_path / "env" / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "-e", tmp_path / "nano"], check=True)
    (tmp_path / "elsewhere").mkdir()

    def run(command, *args):
        line = [tmp_path / "env" / "bin" / command, *args]
        return subprocess.run(line, cwd=tmp_path / "elsewhere", capture_output=True, text=True)

    done = run("nanomole-generate", "--prompt", "What is the plural of mouse?")
    assert done.stdout == "mice\n", done.stderr
    for command in ("train", "eval", "bench"):
        done = run(f"nanomole-{command}", "--help")
        assert done.returncode == 0 and "usage: nanomole-" in done.stdout, done.stderr
