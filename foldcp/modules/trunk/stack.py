"""A stack of pairformer blocks, whatever module their weights come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.base import Block
from foldcp.modules.graphs.block_graph import run_blocks
from foldcp.modules.trunk.block_weights import (
    PairformerBlockWeights,
    update_pair,
    update_single,
)
from foldcp.modules.trunk.masks import stack_masks

Progress = Callable[[int, int], None]


class PairformerBlock(Block):
    """One block on tiles. AlphaFold 3, Algorithm 17."""

    in_place = (False, True)

    def weights(self) -> PairformerBlockWeights:
        """Return the parameters in the order of the block."""
        raise NotImplementedError

    def compute(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor,
        keys: Tensor | None,
        tokens: Tensor | None,
        layout: PairLayout,
    ) -> tuple[Tensor, Tensor]:
        """Run one block without its draws.

        Args:
            s: single shard [B, n, C_s].
            z: pair tile [B, T_r, T_c, C].
            mask: see `stack_masks`.
            keys: see `stack_masks`.
            tokens: see `stack_masks`.
            layout: the tiling.

        Returns:
            (s, z) updated; z in place when gradients are off.
        """
        w = self.weights()
        z = update_pair(z, w.pair, layout, self.mesh, mask, keys)
        if w.single is not None:
            s = update_single(s, z, w.single, layout, self.mesh, tokens)
        return s, z

    def operations(self, *state: Tensor) -> float:
        """See `Block`."""
        return pair_operations(next(x for x in state if x.ndim == 4))


def pair_operations(z: Tensor) -> float:
    """Count the operations of a block's contractions, attentions, projections and transition."""
    batch, rows, cols, channels = z.shape
    return batch * rows * cols * channels * (12 * max(rows, cols) + 68 * channels)


class PairformerStack(nn.Module):
    """Pairformer blocks that run one after the other.

    Attributes:
        layers: the blocks.
        mesh: the mesh.
    """

    layers: nn.ModuleList
    mesh: Mesh

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        layout: PairLayout,
        progress: Progress | None = None,
        token_mask: Tensor | None = None,
        pair_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run all blocks.

        Args:
            s: single shard [B, n, C_s].
            z: pair tile [B, T_r, T_c, C].
            layout: the tiling.
            progress: called with (blocks done, blocks in all).
            token_mask: tokens that are keys of the single track [B, N], the same on every rank,
                1 = keep; None keeps all tokens. Without a `pair_mask` it also masks the pairs.
            pair_mask: pairs that triangle updates read, tile [1 or B, T_r, T_c], 1 = keep; None
                keeps the pairs of kept tokens.

        Returns:
            (s, z) updated; z in place when gradients are off.

        Raises:
            ValueError: a tensor that does not fit the layout.
        """
        masks = stack_masks(layout, self.mesh, token_mask, pair_mask)
        for name, mask in (("token_mask", token_mask), ("pair_mask", pair_mask)):
            if mask is not None and len(mask) not in (1, len(z)):
                self.mesh.refuse(f"`{name}` has a batch of {len(mask)}, but `z` one of {len(z)}")
        s, z = run_blocks(self.layers, (s, z), masks, layout, progress)
        return s, z


class TiledPairformer(PairformerStack):
    """The pairformer stack of any AlphaFold 3-like model on a mesh, from its weights alone.

    Args:
        blocks: weights of the blocks, in their order, on the mesh's device and the same on every
            rank. Parameters are shared with the module that they come from, so they can be trained;
            other tensors become buffers. Channels, heads and their width are those of the weights.
        mesh: the mesh.

    Source: AlphaFold 3 supplement, Algorithm 17; docs/porting.md.
    """

    def __init__(self, blocks: Iterable[PairformerBlockWeights], mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.layers = nn.ModuleList(_PlainBlock(w, mesh) for w in blocks)


class _PlainBlock(PairformerBlock):
    """A block that holds its weights under the names of `PairformerBlockWeights`.

    It draws nothing: random numbers of dropout are a habit of Boltz's.
    """

    def __init__(self, w: PairformerBlockWeights, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.held = mesh, _Held(w)

    def weights(self) -> PairformerBlockWeights:
        """See `PairformerBlock`."""
        return self.held.weights()

    def draw(self, *state_and_layout: Any) -> None:
        """See `Block`."""


class _Held(nn.Module):
    """Holds the tensors of a dataclass of weights as parameters and buffers, by their names.

    Args:
        w: weights, with other dataclasses of weights in them.
    """

    def __init__(self, w: Any) -> None:
        super().__init__()
        self._kind, self._plain = type(w), {}
        for name, value in vars(w).items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            elif value is None or isinstance(value, int):
                self._plain[name] = value
            else:
                self.add_module(name, _Held(value))

    def weights(self) -> Any:
        """Return the dataclass with the tensors that are held now."""
        found: dict[str, Any] = {**self._plain, **self._parameters, **self._buffers}
        parts: Mapping[str, Any] = self._modules
        found |= {name: part.weights() for name, part in parts.items()}
        return self._kind(**found)
