"""The transition module on tiles and token shards."""

from __future__ import annotations

from torch import Tensor

from foldcp.modules.base import TiledModule
from foldcp_kernels.transition import TransitionWeights, transition


class Transition(TiledModule):
    """LayerNorm, SwiGLU, projection, with the residual. AlphaFold 3, Algorithm 11."""

    def weights(self) -> TransitionWeights:
        """Return the parameters in the order of the op."""
        return TransitionWeights(
            self.norm.weight, self.norm.bias, self.fc1.weight, self.fc2.weight, self.fc3.weight
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x + transition(x), x [B, rows, ..., C]; in place when gradients are off."""
        return transition(x, self.weights())
