"""Mixtures that nobody has to learn: the base alone, one adapter by name, each task its own, all
alike."""

from common.files import InputError
from methods.protocol import FixedMixture, all_but


class Base(FixedMixture):
    """No adapter."""

    pattern = "base"
    names = ("base",)
    about = "no adapter"
    needs_adapters = False


class Named(FixedMixture):
    """One adapter for all tokens."""

    pattern = r"adapter:(.+)"
    names = ("adapter:NAME",)
    about = "one adapter by name"
    has_task_adapter = True

    def __init__(self, name, top_k, adapter):
        super().__init__(name, top_k)
        self.adapter = adapter

    def check(self, mole):
        """The adapter has to be in the pool."""
        mole.pool.member(self.adapter)

    def in_memory(self, mole, found, exclude):
        """That adapter."""
        return [self.adapter]

    def weights(self, mole, pool, found, exclude):
        """That adapter, at weight 1."""
        return {self.adapter: 1.0}

    def check_exclude(self, exclude):
        """Nothing is left without it."""
        if self.adapter in exclude:
            raise InputError(f"method {self.name}: that adapter is excluded")


class Oracle(FixedMixture):
    """Each task with its own adapter: the ceiling for any choice among adapters that were trained
    by themselves."""

    pattern = "oracle"
    names = ("oracle",)
    about = "each task with its own adapter (eval.py)"
    per_task = "adapter:{}"
    is_ceiling = True


class Uniform(FixedMixture):
    """All adapters, each weighing 1/e: the mean of the matrices B A, exact."""

    pattern = "uniform|average_ba"
    names = ("uniform", "average_ba")
    about = "all adapters, each weighing 1/e"

    def in_memory(self, mole, found, exclude):
        """All but those of `exclude`."""
        return all_but(mole.pool, exclude)

    def weights(self, mole, pool, found, exclude):
        """1/e each."""
        used = all_but(pool, exclude)
        return {name: 1 / len(used) for name in used}
