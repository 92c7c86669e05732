"""A gate of your own: mole.custom_gates["NAME"] = gate, or {module path: gate}, is a method like
any other."""

from common.files import InputError
from methods.protocol import Gated


class Custom(Gated):
    """Gates as you left them."""

    about = "a gate of your own"
    trained_on_pool = True

    def gates(self, mole, temperature, exclude):
        """What was put into mole.custom_gates, one gate for all Linears or one each."""
        own = mole.custom_gates[self.name]
        return own if isinstance(own, dict) else dict.fromkeys(mole.pool.A, own)

    def check_exclude(self, exclude):
        """A gate that nobody knows can't be told to leave an adapter out."""
        if exclude:
            raise InputError(
                f"method {self.name}: a gate of your own chooses among all adapters, {exclude[0]!r} too"
            )
