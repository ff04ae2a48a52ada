"""The transition module on tiles and token shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foldcp.modules.base import TiledModule
from foldcp_kernels.transition import TransitionWeights, transition


def transition_weights(module: Any) -> TransitionWeights:
    """Return the parameters of a Boltz Transition in the order of the op."""
    return TransitionWeights(
        module.norm.weight,
        module.norm.bias,
        module.fc1.weight,
        module.fc2.weight,
        module.fc3.weight,
    )


class Transition(TiledModule):
    """LayerNorm, SwiGLU, projection, with the residual. AlphaFold 3, Algorithm 11."""

    def weights(self) -> TransitionWeights:
        """Return the parameters in the order of the op."""
        return transition_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + transition(x), x [B, rows, ..., C]; in place when gradients are off."""
        return transition(x, self.weights())
