"""Cut whole tensors into this rank's tile or shard, and bring those together again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from foldcp.fabric.exchange.autograd import fetch, stream
from foldcp.fabric.mesh import Mesh
from foldcp.layout.cuts import chunks
from foldcp.layout.plans import root_plan, token_plan
from foldcp.layout.tiles import PairLayout
from foldcp_kernels.core.chunking import chunk_length


def cut_tile(z: Tensor, layout: PairLayout) -> Tensor:
    """Cut this rank's tile out of a whole pair tensor; nothing is exchanged.

    Args:
        z: whole pair tensor, or mask, [B, N, N, ...].
        layout: the tiling of N tokens.

    Returns:
        A new tensor [B, T_r, T_c, ...], zero on padding.

    Raises:
        ValueError: `z` is not of N tokens.
    """
    _check("z", z, layout, (1, 2))
    (r0, r1), (c0, c1) = layout.tile_box()
    rows, cols = layout.valid((r0, r1)), layout.valid((c0, c1))
    tile = z.new_zeros((len(z), layout.tile_rows, layout.tile_cols, *z.shape[3:]))
    tile[:, :rows, :cols] = z[:, r0 : r0 + rows, c0 : c0 + cols]
    return tile


def cut_shard(s: Tensor, layout: PairLayout) -> Tensor:
    """Cut this rank's shard out of a whole token tensor; nothing is exchanged.

    Args:
        s: whole token tensor [B, N, ...].
        layout: the tiling of N tokens.

    Returns:
        A new tensor [B, n, ...], zero on padding.

    Raises:
        ValueError: `s` is not of N tokens.
    """
    _check("s", s, layout, (1,))
    lo, hi = layout.shard_span()
    real = layout.valid((lo, hi))
    shard = s.new_zeros((len(s), hi - lo, *s.shape[2:]))
    shard[:, :real] = s[:, lo : lo + real]
    return shard


def gather_pairs(z: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor | None:
    """Bring the tiles of all ranks to rank 0, which needs host memory for the whole tensor.

    Args:
        z: pair tile [B, T_r, T_c, ...].
        layout: the tiling.
        mesh: the mesh; every rank must call it.

    Returns:
        The whole tensor [B, N, N, ...] in host memory on rank 0, None on the others.

    Raises:
        ValueError: `z` is not a tile of this layout.
    """
    mesh.check(z, layout)
    whole = None
    if mesh.is_root:
        whole = z.new_empty((len(z), layout.n, layout.n, *z.shape[3:]), device="cpu")
    for lo, rows in rows_at_root(z.detach(), layout, mesh):
        assert whole is not None
        whole[:, lo : lo + rows.shape[1]] = rows
    return whole


def gather_tokens(s: Tensor, layout: PairLayout, mesh: Mesh) -> Tensor:
    """Bring the shards of all ranks to every rank, with gradients.

    Args:
        s: shard [B, n, ...].
        layout: the tiling.
        mesh: the mesh; every rank must call it.

    Returns:
        The whole tensor [B, N, ...] on every rank.
    """
    (whole,) = fetch(mesh, token_plan(layout, ("all",)), (s,), ((1,),), "gather")
    return whole[:, : layout.n]


def rows_at_root(z: Tensor, layout: PairLayout, mesh: Mesh) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of the whole tensor on rank 0, a chunk at a time; nothing on other ranks.

    Args:
        z: tile [B, T_r, T_c, ...].
        layout: the tiling.
        mesh: the mesh; every rank must run the iterator to its end.

    Returns:
        An iterator over (lo, rows lo, lo + 1, ... [B, rows, N, ...]), lo increasing, on the mesh's
        device and valid until the next one.
    """
    each = 2 * z[:, :1, :1].numel() * layout.padded * z.element_size()
    pieces = -(-layout.tile_rows // chunk_length(layout.tile_rows, each, z.device))
    regions = stream(mesh, root_plan(layout, pieces), (z,), ((1, 2),), "gather")
    starts = (
        r * layout.tile_rows + lo
        for r in range(layout.mesh_rows)
        for lo, _ in chunks(layout.tile_rows, pieces)
    )
    for lo, (region,) in zip(starts, regions, strict=True):
        count = layout.valid((lo, lo + region.shape[1]))
        if mesh.is_root and count:
            yield lo, region[:, :count, : layout.n]


def _check(name: str, x: Tensor, layout: PairLayout, dims: tuple[int, ...]) -> None:
    n = layout.n
    if x.ndim <= max(dims) or any(x.shape[d] != n for d in dims):
        want = ", ".join(["B", *[str(n)] * len(dims)])
        raise ValueError(
            f"`{name}` is {list(x.shape)}; expected [{want}, ...], the whole tensor: make the "
            f"layout with mesh.layout(N) for its N"
        )
