"""A pool folder that has the parts for every method."""

import json

import torch

from common.files import write_json, write_jsonl
from helpers_models import write_adapters
from methods import METHODS as TABLE
from methods.batch import method_names
from methods.joint import SAMPLING
from methods.loraflow import loraflow_gates
from methods.mixtures import MoEGate
from methods.ramole import router_loras, save_routers
from methods.session import PromptMask, load_mole
from methods.smear import smear_routers
from model import load_llama
from moe_lora import meteora_gates
from pool.adapters import TEMPLATE
from pool.folder import PoolFolder, write_pool
from pool.gate_files import save_gates
from training.adapters import AdaptersRun, train_adapters

NAMES = ("ant", "bee", "cat")  # of ranks 2, 3, 5
METHODS = method_names()
RETRIEVED = [name for method in TABLE if method.retrieves == "by text" for name in method.names]
LOGO = [name for method in TABLE if method.retrieves == "by a forward pass" for name in method.names]
LORAHUB = {"ant": 0.5, "bee": -0.75, "cat": 1.25}


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_every_part(folder, small_model):
    """A pool folder with every part: three random adapters and random gates of all kinds; lora_f
    and lora_b trained by the real command for a few steps."""
    base = load_llama(small_model)
    adapters = write_adapters(folder / "pool" / "adapters", base, NAMES, size=0.1)
    write_pool(PoolFolder(folder / "pool", adapters, base.fingerprint, TEMPLATE))
    for name, path in adapters.items():
        (path / "samples.jsonl").write_text(json.dumps({"prompt": f"the {name}"}) + "\n")
    pool = load_mole(small_model, folder / "pool").pool
    kinds = {f"meteora_top{k}": (meteora_gates(pool, k), k) for k in (1, 2)} | {
        "soft": (meteora_gates(pool, 3), 3)
    }
    kinds |= {"loraflow": (loraflow_gates(pool), 3), "smear": (smear_routers(pool, PromptMask()), 3)}
    kinds |= {f"moe_top{k}": (meteora_gates(pool, k, make=MoEGate), k) for k in (1, 3)}
    for number, (kind, (gates, k)) in enumerate(kinds.items()):
        for place, gate in enumerate(gates.values()):
            for param in gate.parameters():
                param.data += noise(*param.shape, seed=100 * number + place) * 0.3
        save_gates(folder / "pool" / "gates" / f"{kind}.safetensors", gates, pool, k, pool.names)
    routers = router_loras(pool, 5)
    for router in routers.values():
        router.B.data += noise(*router.B.shape, seed=7) * 0.3
    save_routers(folder / "pool" / "router.safetensors", routers, base, {})
    for name in ("fox", "dog"):
        rows = [{"prompt": f"the {name} {j}", "response": "lazy dog"} for j in range(3)]
        write_json(folder / "tasks" / name / "task.json", {"metric": "exact_match"})
        for split in ("train", "test"):
            write_jsonl(folder / "tasks" / name / f"{split}.jsonl", rows)
    paths = {"model": str(small_model), "tasks": str(folder / "tasks"), "pool": str(folder / "pool")}
    for joint, r in (("lora_f", 2), ("lora_b", 7)):
        train_adapters(AdaptersRun(**paths, joint=joint, r=r, steps=3, batch_size=1, lr=0.1), SAMPLING)
    made_for = {name: pool.members[name].hash for name in NAMES}
    weights = {"fox": LORAHUB, "dog": {"bee": 1.0}, "ant": LORAHUB}
    write_json(folder / "pool" / "baselines" / "lorahub.json", {"adapters": made_for, "weights": weights})
    return folder / "pool"
