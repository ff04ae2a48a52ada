"""Steering potentials on compact features against stock Boltz on dense ones, in float64."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import boltz.main
import boltz_inputs
import parity
import pytest
import torch
from boltz.model.potentials.potentials import VDWOverlapPotential, get_potentials
from boltz_inputs import LIGAND, OTHER, PROTEIN, protein
from ranks import run
from syncs import Syncs
from torch import Tensor

from bench import steering as bench
from foldcp.boltz.families.swap import apply
from foldcp.boltz.steering.factory import BoltzSteering, steering_factory
from foldcp.boltz.steering.overlap import near_pairs, overlap
from foldcp.fabric.mesh import Mesh

ALL_ON = asdict(boltz.main.BoltzSteeringParams()) | dict(
    fk_steering=True, physical_guidance_update=True, num_gd_steps=3, num_particles=2
)
TIMES = (1.0, 0.5, 0.2)
RELATIVE = 1e-9
OVERLAP = {"buffer": 0.225}
UNFORCED = "unforced"
FLAT = "CC(C)=C(C)CO"  # no hydrogen at the double bond


def write_inputs(folder: Path) -> None:
    """Every kind of thing that a potential acts on, in one input; nothing in another."""
    pdbs = [boltz_inputs.write_template(folder / f"{name}.pdb", OTHER) for name in "tuv"]
    chains = [
        protein("[A, B]", OTHER),
        protein("C", PROTEIN[:12]),
        f"- ligand: {{id: [D, E], smiles: '{LIGAND}'}}",
        "- ligand: {id: F, ccd: PHE}",
        "- ligand: {id: [G, H], ccd: MG}",
        f"- ligand: {{id: I, smiles: '{FLAT}'}}",
    ]
    bond = f"- bond: {{atom1: [A, 5, SG], atom2: [I, 1, {boltz_inputs.ligand_atom(FLAT, 0)}]}}"
    forced = [
        "- pocket: {binder: D, contacts: [[A, 3], [C, 2]], max_distance: 5.5, force: true}",
        "- contact: {token1: [A, 9], token2: [C, 4], max_distance: 4, force: true}",
        "- contact: {token1: [B, 9], token2: [C, 7], max_distance: 8}",
    ]
    templates = [
        "templates:",
        f"- {{pdb: {pdbs[0]}, chain_id: A, force: true, threshold: 3.5}}",
        f"- {{pdb: {pdbs[1]}, chain_id: B, force: true, threshold: 1.5}}",
        f"- {{pdb: {pdbs[2]}, chain_id: A}}",
    ]
    texts = {
        "full": [*chains, "constraints:", bond, *forced, *templates],
        # With untrained weights forced contacts can drive stock's own guidance to NaN.
        UNFORCED: [chains[0], chains[2], *chains[-2:], "constraints:", bond, *templates[:2]],
        "plain": [protein("A", PROTEIN[:8])],
    }
    for name, lines in texts.items():
        (folder / f"{name}.yaml").write_text("\n".join(["version: 1", "sequences:", *lines]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("steering")
    write_inputs(path)
    return path


def prepared(folder: Path, name: str) -> parity.Prepared:
    return parity.prepare(folder, folder / f"{name}.yaml")


@lru_cache
def both(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(compact, stock's dense) features in float64."""
    source = prepared(folder, name)
    kinds = parity.compact_features(source), parity.stock_features(source)
    return tuple(map(parity.double_features, kinds))


def coordinates(atoms: int, samples: int, size: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn((samples, atoms, 3), generator=generator, dtype=torch.float64)


def assert_close(got: Tensor, want: Tensor, name: str) -> None:
    assert got.shape == want.shape, name
    assert want.isfinite().all(), f"{name}: stock is not finite"
    error = (got - want).abs().max() / want.abs().max().clamp(min=1)
    assert error < RELATIVE, f"{name}: {float(error):.1e}"


def compare(compact: dict[str, Any], dense: dict[str, Any], samples: int, size: float) -> set[str]:
    """Every potential at every time; the names of those that had energy and gradient."""
    coords, acted = coordinates(dense["atom_pad_mask"].shape[1], samples, size), set()
    with parity.everything_float64():
        ours = BoltzSteering(ALL_ON, compact, torch.device("cpu")).terms
        ours = {type(stock).__name__: term for stock, term in ours}
        for stock in get_potentials(ALL_ON, boltz2=True):
            name = type(stock).__name__
            for parameters in map(stock.compute_parameters, TIMES):
                energy = stock.compute(coords, dense, parameters)
                gradient = stock.compute_gradient(coords, dense, parameters)
                if name not in ours:
                    assert not energy.any() and not gradient.any(), f"{name} was dropped"
                    continue
                assert_close(ours[name].energy(coords, parameters), energy, f"{name} energy")
                assert_close(ours[name].gradient(coords, parameters), gradient, name)
                acted |= {name} if energy.any() and gradient.any() else set()
    return acted


def test_each_potential_is_stocks(folder: Path) -> None:
    compact, dense = both(folder, "full")
    assert dense["template_force"].sum() == 2 and not dense["template_force"].all()
    assert len(dense["contact_union_index"].unique()) == 3
    # 1e4 is beyond what untrained weights give; at 0.3 every pair of atoms overlaps.
    acted = [compare(compact, dense, m, size) for m, size in ((3, 6.0), (2, 0.3), (2, 1e4))]
    assert acted[0] == {type(p).__name__ for p in get_potentials(ALL_ON, boltz2=True)}
    assert "VDWOverlapPotential" in acted[1] and "VDWOverlapPotential" not in acted[2]


def test_repelling_contacts_and_dropped_potentials(folder: Path) -> None:
    compact, dense = (dict(x) for x in both(folder, "full"))
    attract = torch.arange(dense["contact_negation_mask"].shape[1])[None] % 3 > 0
    for feats in (compact, dense):
        feats["contact_negation_mask"] = attract
    assert "ContactPotentital" in compare(compact, dense, 2, 6.0)
    assert compare(*both(folder, "plain"), 2, 6.0) == set()


def test_guidance_only_where_something_applies(folder: Path) -> None:
    plain, full, unforced = (both(folder, name)[0] for name in ("plain", "full", UNFORCED))
    default = asdict(boltz.main.BoltzSteeringParams())
    cpu = torch.device("cpu")
    assert steering_factory(None) is None
    assert steering_factory(default, boltz2=False) is None  # Boltz-1 has no contact guidance
    make = steering_factory(default)
    assert make(plain, cpu) is None
    names = [[type(s).__name__ for s, _ in make(f, cpu).terms] for f in (full, unforced)]
    contact, template = "ContactPotentital", "TemplateReferencePotential"
    assert names == [[contact, template], [template]]
    assert make(full, cpu).guide and not make(full, cpu).resample
    resampled = steering_factory(default | dict(fk_steering=True))(plain, cpu)
    assert resampled.resample and not resampled.guide and not resampled.terms
    boltz1 = steering_factory(ALL_ON | dict(physical_guidance_update=False), boltz2=False)
    assert boltz1(full, cpu).terms and not boltz1(full, cpu).guide


def test_steps_do_not_wait_for_the_device(folder: Path) -> None:
    compact, _ = both(folder, "full")
    steering = BoltzSteering(ALL_ON, compact, torch.device("cpu"))
    coords = coordinates(compact["atom_pad_mask"].shape[1], 2, 6.0)
    for stock, term in steering.terms:
        parameters = stock.compute_parameters(0.2)
        with Syncs() as syncs:
            term.energy(coords, parameters)
            term.gradient(coords, parameters)
        plain = ("linalg_vector_norm", "linalg_cross")  # sums and products, no decomposition
        found = [name for name in syncs.found if name not in plain]
        # The overlap asks for the number of pairs: once for the energy, once for the gradient.
        allowed = (
            ["__int__", "_local_scalar_dense"] * 2 if type(stock) is VDWOverlapPotential else []
        )
        assert found == allowed, type(stock).__name__


@pytest.mark.parametrize("at_once", [1 << 19, 7])
@pytest.mark.parametrize("size", [0.5, 3.0, 1e3, 1e9])
def test_near_pairs_are_complete_and_unique(at_once: int, size: float) -> None:
    samples, n, reach = 2, 40, 1.75
    x = coordinates(n, samples, size)
    x[0, :3] = torch.tensor([[reach, 0, 0], [2 * reach, 0, 0], [-reach, 0, 0]])  # on cell borders
    x[1, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    x[1, 20:] = x[1, 19] + 1e-3 * coordinates(20, 1, 1.0)[0]
    found = [tuple(sorted(p)) for block in near_pairs(x, reach, at_once) for p in zip(*map(
        Tensor.tolist, block), strict=True)]  # fmt: skip
    assert len(found) == len(set(found)), "a pair came twice"
    for m in range(samples):
        d = (x[m, :, None] - x[m]).norm(dim=-1)
        near = {(m * n + i, m * n + j) for i, j in combinations(range(n), 2) if d[i, j] <= reach}
        assert near and near <= set(found)
    assert all(i // n == j // n for i, j in found), "a pair of two samples"


def test_overlap_with_coordinates_that_are_not_finite(folder: Path) -> None:
    compact, dense = both(folder, "full")
    coords = coordinates(dense["atom_pad_mask"].shape[1], 3, 6.0)
    coords[1, 0, 2], coords[2, 5] = torch.nan, torch.inf
    with parity.everything_float64():
        stock, ours = VDWOverlapPotential(OVERLAP), overlap(compact, OVERLAP)
        assert_close(ours.energy(coords, OVERLAP), stock.compute(coords, dense, OVERLAP), "energy")
        got = ours.gradient(coords, OVERLAP)
        want = stock.compute_gradient(coords, dense, OVERLAP)
    assert_close(got[0], want[0], "gradient of the finite sample")
    assert want[1:].isnan().any(-1).any(-1).all()
    assert got[1:].isnan()[want[1:].isnan()].all()


def test_overlap_of_40000_atoms_is_linear_in_memory() -> None:
    """All pairs would take 12 GiB for their indices alone; stated: 4 KiB per atom + 64 MiB."""
    row = bench.measure("foldcp", 40_000, 1, 2.7)
    assert row["energy"] > 0
    assert row["extra_mib"] < 64 + 40_000 * 4 / 1024, row
    assert row["all_pairs_mib"] > 10_000


def predict(mesh: Mesh, folder: Path, name: str) -> tuple[dict[str, Any], int]:
    """A prediction, and how often this rank evaluated the potentials."""
    model = parity.build_model(dtype=torch.float64, steering=ALL_ON)
    apply(model, mesh)
    feats = parity.compact_features(prepared(folder, name))
    count = partial(mock.patch.object, BoltzSteering, autospec=True)
    with (
        count("energy", side_effect=BoltzSteering.energy) as energy,
        count("guidance", side_effect=BoltzSteering.guidance) as guidance,
    ):
        result = parity.stock_outputs(model, feats, steps=20, samples=2, recycling=0)
    return result, energy.call_count + guidance.call_count


@pytest.mark.parametrize("rows,cols", [(1, 1), (2, 2)])
def test_steered_sampler_is_stocks(folder: Path, rows: int, cols: int) -> None:
    results = run(rows, cols, predict, folder, UNFORCED)
    want = stock(folder, UNFORCED)
    unsteered = stock(folder, UNFORCED, steered=False)
    assert (want - unsteered).abs().max() > 0.1, "steering changed nothing"
    error = (results[0][0]["coords"] - want).abs().max()
    assert error < 1e-6, f"{float(error):.1e}"
    # 19 guided steps and, every third step with noise and at the last, an energy.
    assert results[0][1] > 19 and not any(count for _, count in results[1:])


@lru_cache
def stock(folder: Path, name: str, steered: bool = True) -> Tensor:
    off = dict(fk_steering=False, physical_guidance_update=False, contact_guidance_update=False)
    model = parity.build_model(dtype=torch.float64, steering=ALL_ON if steered else off)
    feats = parity.stock_features(prepared(folder, name))
    return parity.stock_outputs(model, feats, steps=20, samples=2, recycling=0)["coords"]
