"""Atom windows, atom <-> token moves and the input embedder against stock Boltz, in float64."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.nn.functional as F
from boltz.model.modules.encodersv2 import get_indexing_matrix, single_to_keys
from boltz.model.modules.trunkv2 import InputEmbedder as StockInputEmbedder
from parity import everything_float64
from torch import Tensor, nn

from foldcp.boltz.families import boltz2_options
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import WINDOW, AtomLayout, PairLayout
from foldcp.modules.atoms.windows import atom_shard, key_windows
from foldcp.modules.trunk.input_embedder import InputEmbedder

MESHES = [(1, 1), (2, 2)]  # test_diffusion.py runs the same parts on more meshes
# 61 tokens: 20 or more windows, N divisible by no mesh; 3 tokens: fewer windows than ranks.
TOKENS = (61, 3)
BACKBONE = 17
DEPTH = 3


def random_sample(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Collated compact features of n tokens with 1 to 23 atoms each, as far as atoms need them."""
    g = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=g)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).double()

    counts = 1 + integers(23, n)
    counts[n // 2 : n // 2 + 5] = 1
    real = int(counts.sum())
    atoms = -(-real // WINDOW) * WINDOW
    mask = (torch.arange(atoms) < real).double()
    token = torch.repeat_interleave(torch.arange(n), counts)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (*(0, 0) * (x.ndim - 1), 0, atoms - real))

    feats = {
        "res_type": integers(33, n),
        "mol_type": integers(4, n),
        "modified": integers(2, n),
        "method_feature": integers(12, n),
        "cyclic_period": (integers(9, n) - 4).clamp(min=0).double(),
        "profile": normal(n, 33).softmax(-1),
        "deletion_mean": normal(n).abs(),
        "token_pad_mask": torch.ones(n).double(),
        "ref_pos": pad(3 * normal(real, 3)),
        "ref_charge": pad(integers(3, real).double() - 1),
        "ref_element": pad(integers(128, real)),
        "ref_atom_name_chars": pad(integers(64, real, 4)),
        "atom_backbone_feat": pad(integers(BACKBONE, real)),
        "ref_space_uid": pad(token // 2),
        "atom_pad_mask": mask,
        "atom_to_token": pad(token),
    }
    return {k: v[None] for k, v in feats.items()}


def dense(feats: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same sample as stock's dense features."""
    n = feats["res_type"].shape[1]
    mask = feats["atom_pad_mask"]
    out = dict(feats, res_type=F.one_hot(feats["res_type"], 33))
    for key, classes in (("ref_element", 128), ("atom_backbone_feat", BACKBONE)):
        out[key] = F.one_hot(feats[key], classes) * mask[..., None]
    out["atom_to_token"] = F.one_hot(feats["atom_to_token"], n) * mask[..., None]
    chars = F.one_hot(feats["ref_atom_name_chars"], 64)
    out["ref_atom_name_chars"] = chars * mask[..., None, None]
    return out


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Noise in every parameter, so that no term is silent; float64."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.data = noise / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.5 + 0.2 * noise
    return module.double().eval().requires_grad_(False)


def layouts(feats: dict[str, Tensor], mesh: Mesh) -> tuple[PairLayout, AtomLayout]:
    n, atoms = feats["res_type"].shape[1], feats["atom_pad_mask"].shape[1]
    layout = PairLayout(n, mesh.rows, mesh.cols, mesh.rank)
    return layout, AtomLayout(atoms // WINDOW, mesh.size, mesh.rank)


def assert_close(ours: Tensor, theirs: Tensor, name: str, tolerance: float = 1e-10) -> None:
    """The largest difference is at most `tolerance` of the largest value."""
    assert ours.shape == theirs.shape, f"{name}: {list(ours.shape)} != {list(theirs.shape)}"
    if theirs.numel():
        error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        assert error <= tolerance * scale, f"{name}: error {error:.2e} of {scale:.2e}"


def _shard(x: Tensor, layout: PairLayout) -> Tensor:
    lo, hi = layout.shard_span()
    return F.pad(x, (0, 0, 0, layout.padded - layout.n))[:, lo:hi]


def check_moves(mesh: Mesh, n: int) -> None:
    """atom -> token mean, token -> atom, halo and gather against their dense definitions."""
    feats = random_sample(n, seed=n)
    layout, atom_layout = layouts(feats, mesh)
    block = atom_shard(feats, layout, atom_layout, mesh, DEPTH)
    one_hot = dense(feats)["atom_to_token"][0]
    g = torch.Generator().manual_seed(1)
    atoms = torch.randn(2, atom_layout.atoms, 5, generator=g).double()
    tokens = torch.randn(2, n, 5, generator=g).double()
    lo, hi = atom_layout.own_span()
    mean = (one_hot / (one_hot.sum(0, keepdim=True) + 1e-6)).T @ atoms
    assert_close(block.to_tokens(atoms[:, lo:hi]), _shard(mean, layout), "to_tokens", 1e-14)
    ours = block.from_tokens(_shard(tokens, layout))
    assert_close(ours, block.cut(one_hot @ tokens), "from_tokens", 1e-14)
    assert torch.equal(block.gather_atoms(atoms[:, lo:hi]), atoms)
    spoiled = block.cut(atoms).clone()
    spoiled[:, : block.own[0]] = torch.nan
    spoiled[:, block.own[1] :] = torch.nan
    assert torch.equal(block.with_halo(spoiled), block.cut(atoms))


def check_input_embedder(mesh: Mesh, n: int) -> None:
    """Both sets of options: Boltz-2's own, and the optional atom features."""
    for options in (
        dict(
            atom_feature_dim=388,
            add_method_conditioning=True,
            add_modified_flag=True,
            add_cyclic_flag=True,
            add_mol_type_feat=True,
        ),
        dict(
            atom_feature_dim=132 + BACKBONE + 38,
            use_no_atom_char=True,
            use_atom_backbone_feat=True,
            use_residue_feats_atoms=True,
        ),
    ):
        twin = randomise(
            StockInputEmbedder(
                atom_s=16,
                atom_z=6,
                token_s=12,
                token_z=10,
                atoms_per_window_queries=32,
                atoms_per_window_keys=128,
                atom_encoder_depth=DEPTH,
                atom_encoder_heads=4,
                **options,
            )
        )
        feats = random_sample(n, seed=n)
        layout, atom_layout = layouts(feats, mesh)
        with everything_float64():
            theirs = twin(dense(feats))
            ours = InputEmbedder(twin, mesh, boltz2_options.input_embedder(twin))(
                feats, layout, atom_layout
            )
        assert_close(ours, _shard(theirs, layout), f"input embedder, N={n}")


def check_all(mesh: Mesh) -> None:
    for n in TOKENS:
        check_moves(mesh, n)
        check_input_embedder(mesh, n)


@pytest.mark.parametrize(("rows", "cols"), MESHES)
def test_atoms_equal_stock(rows: int, cols: int) -> None:
    ranks.run(rows, cols, check_all)


@pytest.mark.parametrize("windows", [1, 2, 7])
def test_key_windows_equal_stock(windows: int) -> None:
    x = torch.randn(2, windows * WINDOW, 3)
    matrix = get_indexing_matrix(windows, WINDOW, 128, x.device)
    theirs = single_to_keys(x, matrix, WINDOW, 128)
    assert torch.equal(key_windows(x).transpose(2, 3), theirs)


def test_layout_for_other_atoms_is_refused() -> None:
    feats = random_sample(5)
    mesh = Mesh.create(1, 1)
    layout, _ = layouts(feats, mesh)
    with pytest.raises(ValueError, match=r"atom_layout.*lays out 320 atoms.*build AtomLayout"):
        atom_shard(feats, layout, AtomLayout(10, 1, 0), mesh, DEPTH)
    with pytest.raises(ValueError, match="mesh expects rank 0 of 1"):
        windows = feats["atom_pad_mask"].shape[1] // WINDOW
        atom_shard(feats, layout, AtomLayout(windows, 2, 1), mesh, DEPTH)
