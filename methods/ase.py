"""Adaptive Shared Experts (arXiv 2510.00570): every token uses some shared adapters, and one softmax
weighs them together with the routed adapters that the gate has chosen.

    idx    = all shared adapters, and the best of the others by  G x,  k in all
    weight = softmax over these k of  G x / T
    loss   = MeteoRA's, with a gate term over the logits of the routed adapters alone

The shared adapters are PEFT folders of POOL/baselines, by default lora_b, which has learnt all tasks.
They join the pool for this method only. GateTermTraining (training/gates.py) computes the loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from common.files import InputError
from common.tensors import read_metadata
from kernels import linear_in
from methods.protocol import TopKGates, member_mask
from methods.session import Mole
from moe_lora import AX, Mixture
from pool.adapters import load_adapter
from pool.folder import PoolFolder, check_twice, is_folder_name
from pool.gate_files import GateFile
from pool.slots import Pool
from training.gates import GateTermRun, GateTermTraining


@dataclass
class AseRun(GateTermRun):
    """Options of `train.py gates --kind ase`."""

    shared: list[str] = field(default_factory=lambda: ["lora_b"])  # adapter that all tokens use; repeatable


class AseGate(nn.Module):
    """The shared slots and the best of the routed ones, k in all, weighed by one softmax.

    `shared` (number of shared adapters,) int64: slots that every token uses. `known` (e,) bool: the
    slots that G was trained with. If there are fewer than k of them, k is smaller. With `keep_logits`,
    `logits` (n, e) keeps those of the last forward, -inf for all but the routed slots.
    """

    linear_in = staticmethod(linear_in)

    def __init__(self, G: Tensor, k: int, shared: Tensor, known: Tensor, temperature=1.0):
        super().__init__()
        self.weight = nn.Parameter(G)  # G (e, i), of routed and shared slots
        self.temperature = temperature
        routed = known.clone()
        routed[shared] = False
        self.register_buffer("shared", shared, persistent=False)
        self.register_buffer("routed", routed, persistent=False)  # (e,)
        self.k_routed = min(k - len(shared), int(routed.sum()))
        self.keep_logits = False
        self.logits = None

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """x (n, i) -> Mixture of k adapters a token, the shared ones first."""
        logits = self.linear_in(x, self.weight, torch.float32)  # (n, e)
        routed = logits.masked_fill(~self.routed, float("-inf"))
        if self.keep_logits:
            self.logits = routed
        top = routed.topk(self.k_routed, dim=-1).indices
        idx = torch.cat([self.shared.expand(len(x), -1), top], dim=1)  # (n, k)
        chosen = logits.gather(1, idx)
        relative = chosen - chosen.amax(-1, keepdim=True)  # no overflow at a low temperature
        return Mixture(idx, (relative / self.temperature).softmax(-1))


def ase_gates(
    pool: Pool, k: int, temperature=1.0, known: Tensor | None = None, shared: Iterable[str] = ()
) -> dict[str, AseGate]:
    """{module path: AseGate with G zero (capacity, i)}. `shared`: names of adapters of `pool`. `known`
    (capacity,) bool: by default the slots in use."""
    gates = {}
    for path, A in pool.A.items():
        slots = torch.tensor([pool.slot(name) for name in shared], dtype=torch.int64, device=A.device)
        mask = member_mask(pool, A.device) if known is None else known
        G = torch.zeros(pool.capacity, A.shape[2], device=A.device)
        gates[path] = AseGate(G, k, slots, mask, temperature)
    return gates


def shared_folders(pool: Path, names: list[str]) -> dict[str, Path]:
    """{shared adapter: POOL/baselines/NAME}. Raises InputError where one isn't there."""
    folders = {}
    for name in names:
        folders[name] = pool / "baselines" / name
        if not (is_folder_name(name) and folders[name].is_dir()):
            made = "python train.py adapters --joint lora_b makes baselines/lora_b"
            raise InputError(f"shared adapter {name!r}: no folder {folders[name]}: {made}")
    return folders


class Ase(TopKGates):
    """Shared and routed adapters under one softmax."""

    pattern = r"ase(?:_top([1-9][0-9]{0,5}))?"
    names = ("ase", "ase_top2")
    about = "Adaptive Shared Experts: adapters that all tokens use, weighed with those chosen"
    paper = "2510.00570"
    kind = "ase"
    Run = AseRun
    Training = GateTermTraining
    trains_adapters = True
    gates_know_tasks = True

    def check(self, mole: Mole) -> None:
        """Raises InputError where the file or a shared adapter's folder isn't there."""
        super().check(mole)
        self.shared(mole)

    def shared(self, mole: Mole) -> dict[str, Path]:
        """{shared adapter: its folder} of the gate file. Raises InputError."""
        file = self.file(mole)
        metadata = read_metadata(file)
        names = metadata.get("shared", "").split("\n")
        if not set(names) <= set(metadata.get("names", "").split("\n")):
            found = f"metadata has shared {', '.join(names)!r}"
            raise InputError(
                f"{file}: {found}, expected some of its names: python {self.made_by} trains them"
            )
        return shared_folders(mole.folder.path, names)

    def pool_of(self, mole: Mole) -> Pool:
        """A copy of mole.pool that the shared adapters have joined."""
        folders = self.shared(mole)
        return mole.pool.joined_by([load_adapter(path, name, mole.shapes) for name, path in folders.items()])

    @classmethod
    def gates_of(cls, rows: GateFile, pool: Pool, temperature: float) -> dict[str, AseGate]:
        """AseGates with the file's shared adapters. Raises InputError where one of them is excluded, or
        all of the routed ones are."""
        shared = rows.metadata["shared"].split("\n")
        if rows.k <= len(shared):
            raise InputError(f"{rows.file}: k is {rows.k}, expected more than the {len(shared)} shared")
        known = {name for name in pool.resident if rows.known[pool.slot(name)]}
        if not set(shared) < known:
            found = "a shared adapter is" if set(shared) - known else "all its routed adapters are"
            raise InputError(f"{rows.file}: {found} excluded")
        return ase_gates(pool, rows.k, temperature, rows.known, shared)

    @classmethod
    def check_run(cls, args, names: list[str]) -> None:
        """Raises InputError where --top_k leaves no routed adapter or is larger than the number of all
        adapters, and where an adapter of the pool has the name of a shared one."""
        check_twice("--shared", args.shared)
        if both := set(names) & set(args.shared):
            raise InputError(f"--shared {min(both)}: an adapter of the pool has that name")
        shared = len(args.shared)
        if not shared < args.top_k <= shared + len(names):
            expected = f"{shared + 1} to {shared + len(names)}: all of --shared and some of {args.pool}"
            raise InputError(f"--top_k is {args.top_k}, expected {expected}")
        super().check_run(args, [*names, *args.shared])

    @classmethod
    def more_adapters(cls, known: PoolFolder, args) -> dict[str, Path]:
        """{shared adapter: its folder}."""
        return shared_folders(known.path, args.shared)

    @classmethod
    def kept(cls, args) -> dict[str, str]:
        """The shared adapters' names."""
        return {"shared": "\n".join(args.shared)}

    @classmethod
    def start_gates(cls, pool: Pool, args) -> dict[str, nn.Module]:
        """Gates as the options say."""
        return ase_gates(pool, args.top_k, args.gate_temperature, shared=args.shared)
