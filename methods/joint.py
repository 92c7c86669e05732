"""LoRA-F and LoRA-B, MeteoRA's baselines: one adapter that has learnt all tasks."""

from pathlib import Path

from methods.protocol import Merged
from methods.session import Mole, Ranking
from pool.adapters import Adapter, load_adapter


def as_it_is(examples: dict[str, list], name: str) -> dict[str, list]:
    """{task: [Example]} -> all of them as one task: a step draws more of those that have more."""
    return {name: sum(examples.values(), [])}


def evenly(examples: dict[str, list], name: str) -> dict[str, list]:
    """{task: [Example]} as they are: a step draws as many of each task."""
    return examples


SAMPLING = {"lora_f": as_it_is, "lora_b": evenly}


class Joint(Merged):
    """An adapter of POOL/baselines/NAME: those of `train.py adapters --joint`, or one of yours."""

    pattern = r"[\w-]+"
    names = tuple(SAMPLING)
    about = "one adapter for all tasks, trained on the data as it is, or evenly"
    paper = "2405.13053"
    decides = "fixed"

    @property
    def has_task_adapter(self) -> bool:
        """Of those that have learnt all tasks; of another folder nobody knows."""
        return self.name in self.names

    @property
    def made_by(self) -> str:
        """The command for this name."""
        return f"train.py adapters --joint {self.name}"

    def folder(self, mole: Mole) -> Path | None:
        """POOL/baselines/NAME, None without a pool folder."""
        return mole.folder.path / "baselines" / self.name if mole.folder else None

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """None: its adapter isn't the pool's."""
        return []

    def check(self, mole: Mole) -> None:
        """The folder has to be there."""
        self.need(self.folder(mole), self.made_by)

    def merge(self, mole: Mole, found: Ranking, exclude: tuple) -> Adapter:
        """The adapter of the folder."""
        return load_adapter(self.folder(mole), self.name, mole.shapes)
