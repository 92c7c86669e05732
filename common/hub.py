"""Models and adapters named as on the Hugging Face hub: ORG/NAME or ORG/NAME@REVISION.

huggingface_hub fetches their files and keeps them in its own cache. This file says which ones: those
that are read here, so no pickle and no second copy of the weights. And it turns what that library
raises into one line.
"""

import fnmatch
import re
import sys
from pathlib import Path

from common.files import InputError, say, warn
from common.llama_folder import read_config, read_index

HUB_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*)(?:@([A-Za-z0-9_./-]+))?")
TIMEOUT = 10  # seconds without an answer, after which the hub counts as unreachable
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What is read of a repository, its config first. Of a model the weights follow: WHOLE, or the shards
# that INDEX names.
READ = {
    "model": [
        *("config.json", "generation_config.json", INDEX, "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("chat_template.jinja", "additional_chat_templates/*.jinja"),
    ],
    "adapter": ["adapter_config.json", "adapter_model.safetensors", "samples.jsonl"],
}
WEIGHTS = {"model": [WHOLE, INDEX], "adapter": ["adapter_model.safetensors"]}


def base_name(name: str | Path) -> str:
    """What adapters trained on model `name` call their base: ORG/NAME of a hub name, of a folder its
    own name."""
    folder = Path(name)
    return folder.resolve().name if folder.exists() else str(name).partition("@")[0]


def find_folder(name: str | Path, what: str) -> Path:
    """The folder of `what`, "model" or "adapter": `name` itself where that exists, else the cache's
    folder with what is read of the hub's repository `name`. Where the hub gives no answer, the cache
    may still hold it. Raises InputError, which names both readings of `name`."""
    if Path(name).exists():
        return Path(name)
    neither = f"{name}: no such {what} folder"
    found = HUB_NAME.fullmatch(str(name))
    if not found:
        raise InputError(f"{neither}, nor a name on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION")
    try:
        from huggingface_hub.constants import ENDPOINT
    except ImportError:
        missing = "to look for it on the Hugging Face hub takes a package that is not here"
        raise InputError(f"{neither}; {missing}: pip install huggingface_hub") from None
    try:
        return _fetch(name, what, *found.groups())
    except InputError:
        raise
    except Exception as error:  # the hub's own, or those of whichever library speaks HTTP for it
        as_name = f"as a name on {ENDPOINT}: {_explain(error, *found.groups())}"
        raise InputError(f"{neither}; {as_name}") from None


def _fetch(name, what, repository, revision):
    """The folder of `repository` in the cache, with what is read of it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    config = READ[what][0]
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
    except Exception as error:
        cached = try_to_load_from_cache(repository, config, revision=revision)
        if not isinstance(cached, str):
            raise
        if not isinstance(error, OfflineModeIsEnabled):
            warn(f"{name}: taken from the cache; the hub: {_explain(error, repository, revision)}")
        return Path(cached).parent
    files = [file.rfilename for file in info.siblings]
    if config not in files or not set(WEIGHTS[what]) & set(files):
        expected = f"{config} and {' or '.join(WEIGHTS[what])}"
        weights = [file for file in files if file.endswith((".safetensors", ".bin", ".pth", ".gguf"))]
        found = ", ".join(weights[:5]) or "no weights"
        raise InputError(f"{name}: no {what} on the hub: expected {expected}, found {found}")
    names = [file for pattern in READ[what] for file in fnmatch.filter(files, pattern)]
    folder = _download(repository, revision, info.sha, names)
    if what == "model":
        read_config(folder)  # refuses another architecture before gigabytes are fetched
        listed = read_index(folder / INDEX).values() if INDEX in files else []
        shards = sorted({file.relative_to(folder).as_posix() for file in listed})
        whole = WHOLE in files and WHOLE not in shards  # as in weight_map()
        _download(repository, folder.name, folder.name, [WHOLE] if whole else shards)
    return folder


def _download(repository, revision, commit, names):
    """Fetches those of the files `names` that the cache lacks; `commit` is the revision's. Returns
    their folder, whose name is the commit. Progress bars are for a terminal: in a log they would be
    hundreds of lines."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import tqdm

    cached = [try_to_load_from_cache(repository, name, revision=commit) for name in names]
    missing = [name for name, file in zip(names, cached, strict=True) if not isinstance(file, str)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        say(f"{repository}: fetching {missing[0]}{more} from the hub")

    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            shown = missing and sys.stderr.isatty()
            super().__init__(*args, **options | {"disable": not shown, "leave": False})
            bars.append(self)

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=names, tqdm_class=Bar))
    finally:
        for bar in reversed(bars):  # the library leaves some open, which later write over other lines
            bar.close()


def _explain(error, repository, revision):
    """What went wrong on the hub, in a part of a line."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    log_in = "log in with 'hf auth login', or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the cache doesn't hold it"
    if isinstance(error, errors.GatedRepoError):
        return f"only for those who have accepted its terms, at {ENDPOINT}/{repository}; then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"no repository of that name, or a private one: {log_in}"
    if status in (401, 403):
        return f"access denied (status {status}): {log_in}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
