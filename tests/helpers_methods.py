"""A pool folder that has the parts for every method."""

import json

import torch

from common.files import write_json, write_jsonl
from common.template import TEMPLATE
from helpers_models import load_mole, write_adapters
from methods import METHODS as TABLE
from methods.batch import method_names, set_methods
from methods.joint import SAMPLING
from methods.protocol import Trained
from methods.ramole import router_loras, save_routers
from methods.samora import SamoraRun, train_samora
from model import load_llama
from moe_lora import detach
from pool.adapters import load_adapter
from pool.folder import PoolFolder, read_pool, write_pool
from pool.gate_files import save_gates
from training.adapters import AdaptersRun, train_adapters

NAMES = ("ant", "bee", "cat")  # of ranks 2, 3, 5
METHODS = method_names()
RETRIEVED = [name for method in TABLE if method.retrieves == "by text" for name in method.names]
DRAWN = [name for method in TABLE if method.retrieves == "at random" for name in method.names]
LOGO = [name for method in TABLE if method.retrieves == "by a forward pass" for name in method.names]
LORAHUB = {"ant": 0.5, "bee": -0.75, "cat": 1.25}


FOUND = {"cat": 0.5, "ant": 0.25}  # what retrieval finds, or LoGo
MIX = "mix:bee=0.75,cat=-0.5"
FILLED_IN = {"adapter:NAME": "adapter:bee", "mix:NAME=WEIGHT,...": MIX, "lorahub:TASK": "lorahub:fox"}
FILLED_IN["samora:TASK"] = "samora:fox"
NAMED = [FILLED_IN.get(name, name) for name in METHODS]
USABLE = [name for name in NAMED if name not in ("oracle", "lorahub")]
IDS = torch.randint(3, 331, (5, 11), generator=torch.Generator().manual_seed(3))


def found_for(methods):
    """What each row of a batch of `methods` has retrieved."""
    return [list(FOUND.items()) if name in (*RETRIEVED, *LOGO, *DRAWN) else [] for name in methods]


@torch.no_grad()
def logits_of(mole, methods, ids=IDS, n_prompt=None, **options):
    """Logits (rows, t, v) of one batch, of whose tokens `n_prompt` are the prompt's, by default all.
    What retrieves has found the same two."""
    set_methods(mole, methods, **{"retrieved": found_for(methods)} | options)
    ids = ids[: len(methods)]
    mole.prompt.mask = (torch.arange(ids.shape[1]) < (n_prompt or ids.shape[1])).expand(ids.shape)
    logits = mole.model(ids)
    mole.prompt.mask = None
    return logits


def close(a, b, limit=2e-5):
    """Whether the largest difference is at most `limit` of the largest value."""
    return (a - b).abs().max() <= limit * b.abs().max()


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_every_part(folder, small_model):
    """A pool folder with every part: three random adapters and random gates of all kinds; lora_f,
    lora_b and samora trained by the real commands for a few steps."""
    base = load_llama(small_model)
    adapters = write_adapters(folder / "pool" / "adapters", base, NAMES, size=0.1)
    write_pool(PoolFolder(folder / "pool", adapters, base.fingerprint(), TEMPLATE))
    for name, path in adapters.items():
        (path / "samples.jsonl").write_text(json.dumps({"prompt": f"the {name}"}) + "\n")
    for name in ("fox", "dog"):
        rows = [{"prompt": f"the {name} {j}", "response": "lazy dog"} for j in range(3)]
        write_json(folder / "tasks" / name / "task.json", {"metric": "exact_match"})
        for split in ("train", "test"):
            write_jsonl(folder / "tasks" / name / f"{split}.jsonl", rows)
    paths = {"model": str(small_model), "tasks": str(folder / "tasks"), "pool": str(folder / "pool")}
    for joint, r in (("lora_f", 2), ("lora_b", 7)):
        train_adapters(AdaptersRun(**paths, joint=joint, r=r, steps=3, batch_size=1, lr=0.05), SAMPLING)
    pool = load_mole(small_model, folder / "pool").pool
    trained = [kind for kind in TABLE if issubclass(kind, Trained)]
    named = [kind.parse(name) for kind in trained for name in kind.names]
    for number, method in enumerate(named):
        args = method.Run(**paths, top_k=method.top_k)
        more = method.more_adapters(read_pool(folder / "pool"), args)
        both = pool.joined_by([load_adapter(path, name) for name, path in more.items()])
        gates = method.training(base, both, args).gates
        detach(base)
        for place, gate in enumerate(gates.values()):
            for param in gate.parameters():
                param.data += noise(*param.shape, seed=100 * number + place) * 0.3
        file = folder / "pool" / "gates" / f"{method.file_name}.safetensors"
        k = args.top_k if method.uses_top_k else len(NAMES)
        save_gates(file, gates, both, k, both.names, base.fingerprint(), method.kept(args))
    routers = router_loras(pool, 5)
    for router in routers.values():
        router.B.data += noise(*router.B.shape, seed=7) * 0.3
    save_routers(folder / "pool" / "router.safetensors", routers, base, {})
    train_samora(SamoraRun(**paths, experts=5, r=3, w_start=1.0, steps=3, batch_size=2, lr=0.05))
    known = {name: pool.members[name].hash for name in NAMES}
    weights = {"fox": LORAHUB, "dog": {"bee": 1.0}, "ant": LORAHUB}
    write_json(folder / "pool" / "baselines" / "lorahub.json", {"adapters": known, "weights": weights})
    return folder / "pool"
