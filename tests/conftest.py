"""What several tests share: small random Llama folders, a small tokenizer, random adapters, the command line."""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import sentencepiece
import torch

from adapters import Adapter, linear_shapes, peft_config, save_adapter
from files import write_safetensors
from model import Llama, read_config

ROOT = Path(__file__).parent.parent
pytest.register_assert_rewrite("training")


def pytest_addoption(parser):
    parser.addoption("--real_model", help="folder of a real Llama with its tokenizer, for the tests marked real")


def pytest_configure(config):
    """All tests but those of a GPU are the CPU's, on every machine."""
    if not re.search(r"(?<!not )\bcuda", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def real_model(request):
    """The folder given as --real_model; asking for real tests without one is an error, not a skip."""
    folder = request.config.getoption("--real_model")
    assert folder, "tests marked real need --real_model DIR"
    return folder


# A small Llama: every size another number, so that a wrong axis can't pass. h = 44 = 4 heads of 11 is no multiple of
# head_dim 6, 4 query heads share 2 key heads.
SMALL = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 331, "hidden_size": 44, "intermediate_size": 67,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
    "max_position_embeddings": 97, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip


def write_llama(folder, seed=0, dtype=torch.float32, **fields):
    """A random Llama as a Hugging Face folder (config.json, model.safetensors); weights large enough to matter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | fields))
    model = Llama(read_config(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, param in model.state_dict().items():
        noise = torch.randn(param.shape, generator=generator)
        tensors[name] = (1 + 0.1 * noise if "norm" in name else noise * 0.15).to(dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def tokenizer_bytes(vocab_size=331):
    """A sentencepiece model with byte fallback, trained on a few lines."""
    text = ["the quick brown fox jumps over the lazy dog", "what is the plural of mouse", "sort these words for me"] * 9
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=out, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A random small Llama with a sentencepiece tokenizer: a whole model folder. Don't write into it."""
    folder = write_llama(tmp_path_factory.mktemp("small") / "small")
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


def random_adapter(name, shapes, r=3, alpha=7.0, seed=0, targets=None, size=0.3):
    """An Adapter with random A and B on `targets` (module suffixes, default all) of `shapes` (linear_shapes)."""
    generator = torch.Generator().manual_seed(seed)
    used = {p: s for p, s in shapes.items() if targets is None or p.endswith(tuple(targets))}
    A = {p: torch.randn(r, i, generator=generator) * size for p, (_, i) in used.items()}
    B = {p: torch.randn(o, r, generator=generator) * size for p, (o, _) in used.items()}
    names = sorted({p.rpartition(".")[2] for p in used})
    return Adapter(name, A, B, dict.fromkeys(A, alpha / r), peft_config(r, alpha, 0.0, names, "small"))


def write_adapters(folder, model, names, **options):
    """Random adapters of ranks 2, 3, 5, 7, ... as PEFT folders under `folder`; returns {name: folder}."""
    ranks, shapes = (2, 3, 5, 7, 11, 13), linear_shapes(model)
    for j, name in enumerate(names):
        save_adapter(random_adapter(name, shapes, ranks[j % len(ranks)], seed=j, **options), Path(folder) / name)
    return {name: Path(folder) / name for name in names}


@pytest.fixture(scope="session")
def trained(small_model, tmp_path_factory):
    """The options of a run of train.py adapters over training.py's two tasks, both learned. Adds to its pool only."""
    from training import options, run

    o = options("adapters", small_model, tmp_path_factory.mktemp("trained") / "out", steps=40, r=5, dropout=0.1)
    run(o)
    return o


# Scripts as processes with standard streams of their own, forked from one that has imported the libraries.
WARM = """
import json, os, runpy, signal, sys, traceback
import jinja2.sandbox, numpy, safetensors.torch, sentencepiece, tokenizers, torch, tqdm
with torch.device("meta"):
    torch.nn.Linear(2, 3), torch.nn.Embedding(5, 7)  # the first time imports sympy: a second
for line in sys.stdin:
    argv, cwd, *files = json.loads(line)
    child = os.fork()
    if not child:
        signal.alarm(300)
        os.chdir(cwd)
        for number, name in enumerate(files):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        sys.argv, code = argv, 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}
_own = threading.local()


def warm(argv, stdin=b"", cwd=None):
    """`python SCRIPT ARGS...` in a tenth of the time of a fresh interpreter; CompletedProcess with text output. From
    any thread."""
    if not hasattr(_own, "server"):  # it ends with us, as its stdin does
        _own.server = subprocess.Popen([sys.executable, "-c", WARM], stdin=-1, stdout=-1, text=True, env=ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file, data in zip(files, (stdin, b"", b""), strict=True):
            file.write_bytes(data)
        _own.server.stdin.write(json.dumps([argv, str(cwd or Path.cwd()), *map(str, files)]) + "\n")
        _own.server.stdin.flush()
        code = int(_own.server.stdout.readline())
        return subprocess.CompletedProcess(argv, code, *(file.read_bytes().decode() for file in files[1:]))


def command(*args, stdin="", cwd=None):
    """Runs `python SCRIPT ARGS...` of the repository; returns the CompletedProcess with text output."""
    script, *rest = map(str, args)
    return warm([str(ROOT / script), *rest], stdin.encode(), cwd)


def assert_refused(done, *words):
    """Bad input: exit status 2, nothing on stdout, one line on stderr besides warnings, naming each of `words`."""
    lines = [y for y in done.stderr.splitlines() if not y.startswith(("warning:", "method:"))]
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
