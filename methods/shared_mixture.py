"""A gate that decides nothing: it uses the mixture that another Linear's gate has just computed."""

from torch import Tensor, nn

from moe_lora import AX, Mixture
from training.adapters import LINEARS


class SharedMixture(nn.Module):
    """Uses the mixture of its leader, a gate that has run before it and keeps its `mixture`."""

    sequential = True

    def __init__(self, leader: nn.Module):
        super().__init__()
        self.leader = (leader,)  # in a tuple it is no submodule: counted, saved and moved once

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """The leader's Mixture for the same tokens."""
        return self.leader[0].mixture


def running_order(path: str) -> tuple[int, int]:
    """(layer, place in the layer) of a Linear. A pool's own order may be another, after an adapter of
    more Linears has joined."""
    return int(path.split(".")[2]), LINEARS.index(path.rpartition(".")[2])
