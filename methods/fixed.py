"""Mixtures that nobody has to learn: the base, one adapter by name, each task its own, all alike, a
sum with weights of the user's own."""

from common.fields import FLOAT32, parse_number
from common.files import InputError
from common.printable import shown
from methods.protocol import FixedMixture, all_but
from methods.session import Mole, Ranking


class Base(FixedMixture):
    """No adapter."""

    pattern = "base"
    names = ("base",)
    about = "no adapter"
    needs_adapters = False


class Mix(FixedMixture):
    """A sum of adapters with weights of the user's own: y = W x + sum_a w_a s_a B_a A_a x, where s_a
    is the adapter's own scale. PEFT's add_weighted_adapter(combination_type="cat") is the same."""

    pattern = r"mix:(.+)"
    names = ("mix:NAME=WEIGHT,...",)
    about = "a fixed sum of adapters, with any weights"

    def __init__(self, name: str, top_k: int, text: str):
        super().__init__(name, top_k)
        self.mixture = self.read(text)

    def read(self, text: str) -> dict[str, float]:
        """{adapter: weight} of what the method's name says. Raises InputError."""
        return read_mixture(text)

    def check(self, mole: Mole) -> None:
        """The adapters have to be in the pool."""
        for adapter in self.mixture:
            mole.pool.member(adapter)

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """Those adapters."""
        return list(self.mixture)

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """As they were given."""
        return self.mixture

    def check_exclude(self, exclude: tuple) -> None:
        """Without one of them it would be another sum."""
        for adapter in self.mixture:
            if adapter in exclude:
                raise InputError(f"method {self.name}: adapter {adapter} is excluded")


class Named(Mix):
    """One adapter for all tokens, at weight 1."""

    pattern = r"adapter:(.+)"
    names = ("adapter:NAME",)
    about = "one adapter by name"
    has_task_adapter = True

    def read(self, adapter: str) -> dict[str, float]:
        """The text is the adapter's name."""
        return {adapter: 1.0}

    @classmethod
    def default(cls, mole: Mole, k: int, k_asked: bool) -> tuple[str, str] | None:
        """The adapter of a pool that has but one."""
        names = mole.pool.names
        return (f"adapter:{names[0]}", "the only one") if len(names) == 1 else None


class Oracle(FixedMixture):
    """Each task with its own adapter: the ceiling for a choice among adapters trained one by one."""

    pattern = "oracle"
    names = ("oracle",)
    about = "each task with its own adapter (eval.py)"
    decides = "per task"
    per_task = "adapter:{}"
    is_ceiling = True


class Uniform(FixedMixture):
    """All adapters, each weighing 1/e: the mean of the matrices B A, exact."""

    pattern = "uniform|average_ba"
    names = ("uniform", "average_ba")
    about = "all adapters, each weighing 1/e"

    def in_memory(self, mole: Mole, found: Ranking, exclude: tuple) -> list[str]:
        """All but those of `exclude`."""
        return all_but(mole.pool, exclude)

    def weights(self, mole: Mole, found: Ranking, exclude: tuple) -> dict[str, float]:
        """1/e each."""
        used = all_but(mole.pool, exclude)  # a gate beside it may have a pool with others
        return {name: 1 / len(used) for name in used}


def read_mixture(text: str) -> dict[str, float]:
    """a=0.7,b=-0.5 -> {"a": 0.7, "b": -0.5}. Raises InputError."""
    mixture = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        name = name.strip()
        if not name:
            raise InputError(f"mixture {shown(text)}: {shown(part)}, expected NAME=WEIGHT")
        weight = parse_number(f"mixture {shown(text)}: the weight of {name}", number.strip(), FLOAT32)
        if name in mixture:
            raise InputError(f"mixture {text!r}: adapter {name} twice")
        mixture[name] = weight
    return mixture
