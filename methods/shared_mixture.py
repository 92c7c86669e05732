"""A gate that decides nothing: it uses the mixture that another Linear's gate has just computed."""

from torch import Tensor, nn

from moe_lora import AX, Mixture


class SharedMixture(nn.Module):
    """Uses the mixture of its leader, a gate that has run before it and keeps its `mixture`."""

    sequential = True

    def __init__(self, leader: nn.Module):
        super().__init__()
        self.leader = (leader,)  # in a tuple it is no submodule: counted, saved and moved once

    def forward(self, x: Tensor, sample: Tensor, ax: AX) -> Mixture:
        """The leader's Mixture for the same tokens."""
        return self.leader[0].mixture
