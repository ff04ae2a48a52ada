"""Cut whole tensors into the tiles and shards of a rank, and compare what ops make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout

TOLERANCE = 1e-12  # relative, float64


def rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def pad_tile(x: Tensor, layout: PairLayout, dims: tuple[int, int], fill: float = 7.0) -> Tensor:
    """This rank's tile of a whole tensor; padding holds junk that must never matter."""
    out = x
    for d, span in zip(dims, layout.tile_box(), strict=True):
        shape = list(out.shape)
        shape[d] = layout.padded - layout.n
        out = torch.cat((out, out.new_full(shape, fill)), d).narrow(d, span[0], span[1] - span[0])
    return out.clone()


def pad_shard(x: Tensor, layout: PairLayout, dim: int, fill: float = 7.0) -> Tensor:
    shape = list(x.shape)
    shape[dim] = layout.padded - layout.n
    lo, hi = layout.shard_span()
    return torch.cat((x, x.new_full(shape, fill)), dim).narrow(dim, lo, hi - lo).clone()


def shard(layout: PairLayout) -> tuple[slice, int]:
    """(tokens of this rank's shard, how many of its rows they fill)."""
    lo, hi = layout.shard_span()
    return slice(min(lo, layout.n), min(hi, layout.n)), layout.valid((lo, hi))


def error(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def check(
    name: str, mesh: Mesh, n: int, pairs: list[tuple[Tensor, Tensor]], tolerance: float = TOLERANCE
) -> None:
    for i, (got, want) in enumerate(pairs):
        e = error(got, want)
        assert e <= tolerance, f"{name} N={n} mesh {mesh.rows}x{mesh.cols} tensor {i}: {e:.2e}"


def valid(x: Tensor, layout: PairLayout, dims: tuple[int, int]) -> Tensor:
    for d, span in zip(dims, layout.tile_box(), strict=True):
        x = x.narrow(d, 0, layout.valid(span))
    return x


def whole(x: Tensor, layout: PairLayout, dims: tuple[int, int]) -> Tensor:
    for d, (lo, _), span in zip(dims, layout.tile_box(), layout.tile_box(), strict=True):
        x = x.narrow(d, min(lo, layout.n), layout.valid(span))
    return x


def gathered(mesh: Mesh, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tensors of all ranks, in one message each."""
    flat = mesh.ranks.all_gather_object(torch.cat([x.flatten() for x in tensors]))
    sizes = [x.numel() for x in tensors]
    return [[p.view_as(x) for p, x in zip(f.split(sizes), tensors, strict=True)] for f in flat]
