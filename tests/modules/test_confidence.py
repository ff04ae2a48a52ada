"""Confidence, distogram and template modules on every mesh equal stock's, in float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from compact import (
    bare,
    complex_feats,
    error,
    randomise,
    shard,
    stock_in_double,
    template_feats,
    tile,
)
from ranks import run
from torch import Tensor, nn

from foldcp.boltz.families import boltz2_options
from foldcp.fabric.mesh import Mesh
from foldcp.layout.tiles import PairLayout
from foldcp.modules.confidence.distogram import DistogramModule
from foldcp.modules.confidence.module import ConfidenceModule
from foldcp.modules.confidence.scores import frame_mask, ligands
from foldcp.modules.trunk.templates import TemplateModule, TemplateV2Module
from foldcp_kernels.binned_heads import expectations
from foldcp_kernels.core import chunking

MESHES = [(1, 1), (1, 2), (2, 2), (2, 3)]
TOLERANCE = 1e-10  # relative, float64
C_S, C_Z, C_T, SAMPLES = 16, 8, 8, 3
PAIRFORMER = {"num_blocks": 1, "num_heads": 2, "pairwise_head_width": 4, "pairwise_num_heads": 2}
CONFIDENCE = {
    "separate heads": (True, True, SAMPLES),
    "atom level": (False, False, 1),
}
TEMPLATES = {
    "v2 three": (True, (True, False, True)),
    "v2 one": (True, (True,)),
    "v2 none": (True, (False, False)),
    "v1 two": (False, (True, True)),
}


@contextmanager
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _inputs(n: int, atoms: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    s_inputs, s, z, x = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((1, n, C_S), (1, n, C_S), (1, n, n, C_Z), (SAMPLES, atoms, 3))
    )
    x *= 7  # angstrom: some tokens of different chains touch, others do not
    x[:, 2] = 2 * x[:, 1] - x[:, 0]  # the first frame is collinear
    return {"s_inputs": s_inputs, "s": s, "z": z, "x": x}


def _confidence(full: bool, token_level: bool) -> nn.Module:
    from boltz.model.modules.confidencev2 import ConfidenceModule as StockConfidence

    extra = {
        name: full
        for name in (
            "add_s_to_z_prod",
            "add_s_input_to_s",
            "add_z_input_to_z",
            "bond_type_feature",
            "fix_sym_check",
            "cyclic_pos_enc",
        )
    }
    twin = StockConfidence(
        C_S,
        C_Z,
        dict(PAIRFORMER),
        token_level_confidence=token_level,
        confidence_args={"use_separate_heads": full},
        conditioning_cutoff_min=4.0,
        conditioning_cutoff_max=20.0,
        **extra,
    )
    return randomise(twin)


def _template(v2: bool) -> nn.Module:
    from boltz.model.modules import trunkv2

    kind = trunkv2.TemplateV2Module if v2 else trunkv2.TemplateModule
    return randomise(kind(C_Z, C_T, 2, pairwise_head_width=4, pairwise_num_heads=2))


class _Sink:
    """Keeps row blocks, copied because their memory is used again."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, int], list[Tensor]] = {}

    def rows(self, name: str, sample: int, lo: int, block: Tensor) -> None:
        found = self.blocks.setdefault((name, sample), [])
        assert lo == sum(len(b) for b in found), "rows in order, without gaps"
        found.append(block.clone())

    def whole(self, name: str, samples: int) -> Tensor:
        return torch.stack([torch.cat(self.blocks[name, m]) for m in range(samples)])


@lru_cache
def _cases() -> dict[str, Any]:
    """What the ranks need: inputs, parameters, and what stock computes. Only here is stock run."""
    from boltz.model.modules import trunkv2

    from foldcp.boltz.features.dense import dense_view

    feats = complex_feats()
    n = feats["asym_id"].shape[1]
    inputs = _inputs(n, feats["atom_pad_mask"].shape[1])
    dense = dict(dense_view(feats))
    mask = feats["token_pad_mask"]
    cases: dict[str, Any] = {"feats": feats, "inputs": inputs, "confidence": {}, "templates": {}}
    with stock_in_double(), torch.no_grad():
        distogram = randomise(trunkv2.DistogramModule(C_Z, 64, 2), 5)
        logits = distogram(inputs["z"])[:, :, :, 0]
        cases["distogram"] = (bare(distogram), logits.softmax(-1)[..., :20].sum(-1), logits)
        for name, (full, token_level, samples) in CONFIDENCE.items():
            twin = _confidence(full, token_level)
            torch.manual_seed(11)
            out = twin(
                inputs["s_inputs"],
                inputs["s"],
                inputs["z"],
                inputs["x"][:samples],
                dense,
                logits,
                multiplicity=samples,
                run_sequentially=True,
            )
            keep = {k: v for k, v in out.items() if "logits" not in k}
            cases["confidence"][name] = (bare(twin), samples, keep, torch.rand(3))
        for name, (v2, present) in TEMPLATES.items():
            twin = _template(v2)
            extra = template_feats(feats, present)
            stock = {**dense, **extra}
            stock["template_restype"] = nn.functional.one_hot(extra["template_restype"], 33)
            torch.manual_seed(12)
            update = twin(inputs["z"], stock, mask[:, :, None] * mask[:, None])
            cases["templates"][name] = (
                bare(twin),
                v2,
                extra,
                inputs["z"] + update,
                torch.rand(3),
                any(present),
            )
    return cases


def _rank(mesh: Mesh, cases: dict[str, Any], chunk_bytes: int | None) -> dict[str, float]:
    """Run all cases on one rank; returns the error of each result."""
    assert mesh.size == 1 or "boltz" not in sys.modules, "a spawned rank needs no boltz"
    chunking.set_chunk_bytes(chunk_bytes)
    layout = PairLayout(cases["feats"]["asym_id"].shape[1], mesh.rows, mesh.cols, mesh.rank)
    errors: dict[str, float] = {}
    try:
        with _double(), torch.no_grad():
            _run_distogram(mesh, layout, cases, errors)
            _run_confidence(mesh, layout, cases, errors)
            _run_templates(mesh, layout, cases, errors)
    finally:
        chunking.set_chunk_bytes(None)
    return errors


def _real(x: Tensor, whole: Tensor, layout: PairLayout) -> tuple[Tensor, Tensor]:
    """(real part of a tile [1, T_r, T_c, ...], the same part of the whole)."""
    (r0, r1), (c0, c1) = layout.tile_box()
    rows, cols = layout.valid((r0, r1)), layout.valid((c0, c1))
    return x[:, :rows, :cols], whole[:, r0 : r0 + rows, c0 : c0 + cols]


def _tile_error(x: Tensor, whole: Tensor, layout: PairLayout) -> float:
    mine, want = _real(x, whole, layout)
    return error(mine, want) if want.numel() else 0.0


def _run_distogram(
    mesh: Mesh, layout: PairLayout, cases: dict[str, Any], errors: dict[str, float]
) -> None:
    twin, contact, logits = cases["distogram"]
    ours = DistogramModule(twin, mesh, boltz2_options.distogram(twin))
    z = tile(cases["inputs"]["z"], layout)
    errors["contact"] = _tile_error(ours.contact_probability(z, layout), contact, layout)
    rows = torch.cat([x for _, x in ours.logits_rows(z, layout)], 1)
    errors["distogram logits"] = _tile_error(rows, logits, layout)


def _run_confidence(
    mesh: Mesh, layout: PairLayout, cases: dict[str, Any], errors: dict[str, float]
) -> None:
    inputs = cases["inputs"]
    contact = tile(cases["distogram"][1], layout)
    for name, (twin, samples, want, after) in cases["confidence"].items():
        ours = ConfidenceModule(twin, mesh, boltz2_options.confidence(twin))
        assert ours.state_dict().keys() == twin.state_dict().keys()
        for reuse in (False, True) if samples == 1 else (True,):
            z = tile(inputs["z"], layout)
            before = z.clone()
            torch.manual_seed(11)
            sink = _Sink() if reuse and mesh.is_root else None
            rated = ours(
                shard(inputs["s_inputs"], layout),
                shard(inputs["s"], layout),
                z,
                inputs["x"][:samples],
                cases["feats"],
                contact,
                layout,
                reuse_z=reuse,
                sink=sink,
            )
            if sink is not None:
                assert rated.pae is rated.pde is None, "matrices are in memory and in the sink"
                rated = replace(rated, **{x: sink.whole(x, samples) for x in ("pae", "pde")})
            out = {**vars(rated), **vars(rated.tm)}
            del out["tm"]
            prefix = f"{name}, reuse={reuse}"
            errors[f"{prefix}: rng"] = error(torch.rand(3), after)
            assert reuse or torch.equal(z, before), "z was changed"
            assert out.keys() == want.keys(), out.keys() ^ want.keys()
            for key, value in _flat(out).items():
                if key in ("pae", "pde") and not mesh.is_root:
                    assert value is None
                    continue
                errors[f"{prefix}: {key}"] = error(value, _flat(want)[key])


def _run_templates(
    mesh: Mesh, layout: PairLayout, cases: dict[str, Any], errors: dict[str, float]
) -> None:
    for name, (twin, v2, extra, want, after, some) in cases["templates"].items():
        ours = (TemplateV2Module if v2 else TemplateModule)(
            twin, mesh, boltz2_options.template(twin)
        )
        assert ours.state_dict().keys() == twin.state_dict().keys()
        z = tile(cases["inputs"]["z"], layout)
        before = z.clone()
        torch.manual_seed(12)
        assert ours(z, {**cases["feats"], **extra}, layout) is z
        errors[f"{name}: rng"] = error(torch.rand(3), after)
        errors[f"{name}: z"] = _tile_error(z, want, layout)
        assert some or torch.equal(z, before), "no template, but z was changed"


def _flat(out: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in out.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_every_rank_equals_stock(mesh_shape: tuple[int, int]) -> None:
    chunk_bytes = 100_000 if mesh_shape != (1, 1) else None  # several chunks per tile
    for rank, errors in enumerate(run(*mesh_shape, _rank, _cases(), chunk_bytes, bare=True)):
        bad = {k: e for k, e in errors.items() if not e < TOLERANCE}
        assert not bad, f"rank {rank}: {bad}"
        assert len(errors) > 50


def test_the_cases_tell_scores_apart() -> None:
    """A score that is zero, or equal for all pairs of chains, would hide a wrong mask."""
    out = _flat(_cases()["confidence"]["separate heads"][2])
    for key in ("ptm", "iptm", "ligand_iptm", "protein_iptm", "complex_ipde"):
        assert (out[key] > 0).all(), key
    pairs = torch.stack([v for k, v in out.items() if k.startswith("pair_chains")])
    assert pairs[:, 0].unique().numel() > 25
    assert (out["complex_plddt"] != out["complex_iplddt"]).all()


def test_frames_of_ligands_follow_the_prediction() -> None:
    feats, x = complex_feats(), _cases()["inputs"]["x"][0].clone()
    (ligand,) = ligands(feats)
    start = ligand.atom
    assert ligand.token == int((feats["asym_id"][0] < 3).sum()) and len(ligand.atoms) == 6
    spread = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [9, 9, 9], [9, 9, 8]])
    x[start : start + 6] = spread.double()
    tokens = slice(ligand.token, ligand.token + 6)
    assert frame_mask(x, feats, [ligand])[tokens].tolist() == [1, 1, 1, 1, 1, 1]
    x[start : start + 6] = torch.arange(6.0).double()[:, None] * torch.ones(3).double()
    assert frame_mask(x, feats, [ligand])[tokens].tolist() == [0, 0, 0, 0, 0, 0]
    two = {**feats, "frames_idx": feats["frames_idx"].expand(-1, 2, -1, -1)}
    with pytest.raises(ValueError, match="`frames_idx` holds 2 conformers"):
        frame_mask(x, two, [ligand])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expectations_survive_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4], [0.0, 1.0, 2.0]]).to(dtype)
    values = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    want = (logits.double().softmax(-1) @ values.double().T).T
    torch.testing.assert_close(expectations(logits, values).double(), want, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"`values` is \[2, 2\]; expected \[V, 3\]"):
        expectations(logits, values[:, :2])
