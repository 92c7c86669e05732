"""A gate that decides nothing: it returns the mixture that another Linear's gate has just computed."""

from torch import Tensor, nn

from moe_lora import AX, Mixture
from training.adapters import LINEARS


class SharedMixture(nn.Module):
    """Returns the `mixture` of its leader, a gate that has run before it for the same tokens."""

    sequential = True

    def __init__(self, leader: nn.Module):
        super().__init__()
        self.leader = (leader,)  # in a tuple, so that it is no submodule, which would be saved twice

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """The leader's Mixture for the same tokens."""
        return self.leader[0].mixture


def running_order(path: str) -> tuple[int, int]:
    """(layer, position in the layer) of the Linear at `path`: Linears sorted by it are in the order in
    which they run. The order of pool.A differs once an adapter with more Linears has joined."""
    return int(path.split(".")[2]), LINEARS.index(path.rpartition(".")[2])
