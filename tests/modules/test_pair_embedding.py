"""Relative positions, bonds and contacts of every tile equal stock's dense computation."""

from __future__ import annotations

import pytest
import torch
from boltz.model.modules.encodersv2 import RelativePositionEncoder as StockRelPos
from boltz.model.modules.trunkv2 import ContactConditioning
from compact import complex_feats, error, randomise, stock_in_double
from torch import Tensor, nn

from foldcp.boltz.families import boltz2_options
from foldcp.boltz.features.dense import dense_view
from foldcp.fabric.mesh import Mesh
from foldcp.fabric.ranks import Ranks
from foldcp.layout.tiles import PairLayout
from foldcp.modules.trunk.pair_embedding import (
    ContactOptions,
    PairEmbedding,
    RelativePositionEncoder,
)
from foldcp_kernels.core import chunking

C = 12
MESHES = [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 3)]
TOLERANCE = 1e-12  # relative, float64; sums are taken in another order


def _stock(fix_sym_check: bool, cyclic: bool, types: bool) -> dict[str, nn.Module | None]:
    return {
        "rel_pos": randomise(StockRelPos(C, fix_sym_check=fix_sym_check, cyclic_pos_enc=cyclic)),
        "token_bonds": randomise(nn.Linear(1, C, bias=False), 1),
        "token_bonds_type": randomise(nn.Embedding(7, C), 2) if types else None,
        "contact_conditioning": randomise(ContactConditioning(C, 4.0, 20.0), 3),
    }


def _dense(stock: dict[str, nn.Module | None], feats: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(relative positions, everything), [1, N, N, C] each, by stock's own modules."""
    with stock_in_double():
        dense = dense_view(feats)
        relative = stock["rel_pos"](dense)
        total = relative + stock["token_bonds"](dense["token_bonds"].float())
        if stock["token_bonds_type"] is not None:
            total = total + stock["token_bonds_type"](dense["type_bonds"].long())
        return relative, total + stock["contact_conditioning"](dense)


def _tiled(stock: dict[str, nn.Module | None], mesh: Mesh) -> PairEmbedding:
    options = boltz2_options.relative_position(stock["rel_pos"])
    return PairEmbedding(
        contacts=ContactOptions(4.0, 20.0),
        **{**stock, "rel_pos": RelativePositionEncoder(stock["rel_pos"], mesh, options)},
    )


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("fix_sym_check", [False, True])
@pytest.mark.parametrize(("cyclic", "contacts", "types"), [(True, True, True), (False,) * 3])
def test_rows_equal_stock(
    mesh_shape: tuple[int, int], fix_sym_check: bool, cyclic: bool, contacts: bool, types: bool
) -> None:
    feats = complex_feats(cyclic=cyclic, contacts=contacts)
    n = feats["asym_id"].shape[1]
    stock = _stock(fix_sym_check, True, types)
    relative, total = _dense(stock, feats)
    start = torch.randn_like(total)
    for rank in range(mesh_shape[0] * mesh_shape[1]):
        layout = PairLayout(n, *mesh_shape, rank)
        mesh = Mesh(*mesh_shape, Ranks(rank, mesh_shape[0] * mesh_shape[1]))
        embedding = _tiled(stock, mesh)
        (r0, _), (c0, c1) = layout.tile_box()
        cols = slice(c0, min(c1, n))
        for lo, hi in chunking.spans(layout.tile_rows, 5):
            rows = slice(r0 + lo, min(r0 + hi, n))
            valid = layout.valid((r0 + lo, r0 + hi)), layout.valid((c0, c1))
            got = embedding.relpos_rows(feats, layout, lo, hi)
            assert got.shape == (1, hi - lo, layout.tile_cols, C)
            assert torch.isfinite(got).all()
            out = torch.zeros_like(got)
            out[:, : valid[0], : valid[1]] = start[:, rows, cols]
            embedding.add_rows_(out, feats, layout, lo, hi)
            if 0 in valid:
                continue
            for name, mine, want in (
                ("relative", got, relative[:, rows, cols]),
                ("total", out, (start + total)[:, rows, cols]),
            ):
                e = error(mine[:, : valid[0], : valid[1]], want)
                assert e < TOLERANCE, f"{name} of rank {rank}, rows {lo}:{hi}: {e:.1e}"


def test_cyclic_offsets_wrap() -> None:
    """Turning the period off must matter, or the test above would not see it."""
    stock = _stock(True, True, True)
    layout, mesh = PairLayout(37, 1, 1, 0), Mesh(1, 1)
    wrapped, straight = (complex_feats(cyclic=c) for c in (True, False))
    layout = PairLayout(wrapped["asym_id"].shape[1], 1, 1, 0)
    embedding = _tiled(stock, mesh)
    a = embedding.relpos_rows(wrapped, layout, 0, layout.n)
    b = embedding.relpos_rows(straight, layout, 0, layout.n)
    changed = (a != b).any(-1)[0]
    period = wrapped["cyclic_period"][0] > 0
    assert changed.any() and not changed[:, ~period].any()


def test_small_chunks_change_nothing() -> None:
    stock, feats = _stock(True, True, True), complex_feats()
    n = feats["asym_id"].shape[1]
    layout, mesh = PairLayout(n, 1, 1, 0), Mesh(1, 1)
    embedding = _tiled(stock, mesh)
    whole, pieces = (torch.zeros(1, n, n, C, dtype=torch.float64) for _ in range(2))
    embedding.add_rows_(whole, feats, layout, 0, n)
    chunking.set_chunk_bytes(20_000)
    try:
        embedding.add_rows_(pieces, feats, layout, 0, n)
    finally:
        chunking.set_chunk_bytes(None)
    assert torch.equal(whole, pieces)


def test_wrong_rows_and_bond_features_are_refused() -> None:
    stock, feats = _stock(True, True, True), complex_feats()
    n = feats["asym_id"].shape[1]
    layout, mesh = PairLayout(n, 1, 1, 0), Mesh(1, 1)
    embedding = _tiled(stock, mesh)
    with pytest.raises(ValueError, match=r"`out` is .* pass z\[:, 0:4\]"):
        embedding.add_rows_(torch.zeros(1, 5, n, C), feats, layout, 0, 4)
    with pytest.raises(ValueError, match="bond features"):
        _tiled({**stock, "token_bonds": nn.Linear(3, C)}, mesh)
