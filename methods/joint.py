"""LoRA-F and LoRA-B: one adapter that has learnt all tasks, on the data as it is or evenly
(MeteoRA's baselines)."""

from methods.protocol import Merged
from pool.adapters import load_adapter


def as_it_is(examples, name):
    """{task: [Example]} -> all of them as one task: a step draws more of those that have more."""
    return {name: [example for some in examples.values() for example in some]}


def evenly(examples, name):
    """{task: [Example]} as they are: a step draws as many of each task."""
    return examples


SAMPLING = {"lora_f": as_it_is, "lora_b": evenly}


class Joint(Merged):
    """An adapter of POOL/baselines/NAME: those of `train.py adapters --joint`, or one of yours."""

    pattern = r"[\w-]+"
    names = tuple(SAMPLING)
    about = "one adapter on all the data as it is, or evenly of all tasks"

    @property
    def has_task_adapter(self):
        """Of those that have learnt all tasks; of another folder nobody knows."""
        return self.name in self.names

    @property
    def made_by(self):
        """The command for this name."""
        return f"train.py adapters --joint {self.name}"

    def folder(self, mole):
        """POOL/baselines/NAME, None without a pool folder."""
        return mole.folder.path / "baselines" / self.name if mole.folder else None

    def in_memory(self, mole, found, exclude):
        """None: its adapter isn't the pool's."""
        return []

    def check(self, mole):
        """The folder has to be there."""
        self.need(self.folder(mole), self.made_by)

    def merge(self, mole, found, exclude):
        """The adapter of the folder."""
        return load_adapter(self.folder(mole), self.name, mole.shapes)
