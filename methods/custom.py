"""A gate of your own: mole.custom_gates["NAME"] = gate, or {module path: gate}, is a method."""

from torch import nn

from common.files import InputError
from methods.protocol import Gated
from methods.session import Mole
from pool.slots import Pool


class Custom(Gated):
    """Gates as you left them."""

    about = "a gate of your own"
    trained_on_pool = True

    def gates(self, mole: Mole, pool: Pool, temperature: float, exclude: tuple) -> dict[str, nn.Module]:
        """What was put into mole.custom_gates, one gate for all Linears or one each."""
        own = mole.custom_gates[self.name]
        return own if isinstance(own, dict) else dict.fromkeys(pool.A, own)

    def check_exclude(self, exclude: tuple) -> None:
        """A gate that nobody knows can't be told to leave an adapter out."""
        if exclude:
            found = f"method {self.name}: a gate of your own"
            raise InputError(f"{found} chooses among all adapters, {exclude[0]!r} too")
