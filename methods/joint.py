"""LoRA-F and LoRA-B: one adapter that has learnt all tasks, on the data as it is or evenly (MeteoRA's baselines)."""

from methods.protocol import Merged
from pool.adapters import load_adapter


class Joint(Merged):
    """An adapter of POOL/baselines/NAME: those of `train.py adapters --joint`, or one of yours."""

    pattern = r"[\w-]+"
    names = ("lora_f", "lora_b")
    about = "one adapter on all the data as it is, or evenly of all tasks"
    has_task_adapter = True

    @property
    def made_by(self):
        """The command for this name."""
        return f"train.py adapters --joint {self.name}"

    def folder(self, mole):
        """POOL/baselines/NAME, None without a pool folder."""
        return mole.folder.path / "baselines" / self.name if mole.folder else None

    def in_memory(self, mole, found, exclude):
        return []

    def check(self, mole):
        self.need(self.folder(mole), self.made_by)

    def merge(self, mole, found, exclude):
        return load_adapter(self.folder(mole), self.name, mole.shapes)
