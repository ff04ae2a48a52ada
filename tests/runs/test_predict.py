"""Everything that `boltz predict` does, end to end: foldcp on 1x1 and 2x2 against stock Boltz.

All run in float64 (predict_runs.py), with one seed per command; inputs of a folder are folded
one after the other from one stream of random numbers, so that a draw too many or too few anywhere
moves all that follows. Every file that stock leaves must be there, and be the same.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import gemmi
import msa_server
import numpy as np
import parity
import predict_inputs as inputs
import pytest
import torch
from predict_runs import Case, Ended, run_cases
from ranks import run
from result_files import differences

from bench.synthetic.checkpoint import write_checkpoint
from foldcp import __version__
from foldcp.boltz.api import predictions
from foldcp.boltz.families.swap import apply
from foldcp.fabric.mesh import Mesh

TOLERANCE = 1e-6  # absolute, in the unit of the number (angstrom, 0 to 1)
FAST = "--accelerator cpu --sampling_steps 20 --recycling_steps 1 --num_workers 0"
FAST += " --preprocessing-threads 1"  # with more, the order of inputs is left to chance
SIDES = {"stock": 0, "1x1": 1, "2x2": 4}


@dataclass(frozen=True)
class Wanted:
    """What one case asks of Boltz, on every side.

    Args:
        commands: data and further options, each; "{side}" becomes the side's name. Or "remove" and
            a file of the results.
        models: number of structures that must be there in the end.
        environ: variables.
        seed: `--seed`, None leaves it out.
    """

    commands: list[str]
    models: int
    environ: dict[str, str] = field(default_factory=dict)
    seed: int | None = 1


def wanted(at: Path, url: str) -> dict[str, Wanted]:
    """The cases; `at` holds what `prepare` made."""
    affinity = "--sampling_steps_affinity 3 --diffusion_samples_affinity 2"
    again = f"{at}/all/binder.yaml --affinity_mw_correction {affinity}"
    return {
        "inputs": Wanted([f"{at}/all {affinity}"], 6),
        "options": Wanted([
            f"{at}/small.yaml --method electron_microscopy --subsample_msa --num_subsampled_msa 2"
            " --diffusion_samples 4 --max_parallel_samples 3 --write_embeddings"
            " --step_scale 1.2 --recycling_steps 2"
        ], 4),
        "names": Wanted([
            f"{at}/odd_names --output_format pdb --no_kernels --max_msa_seqs 4 --num_workers 2"
            f" --checkpoint {at}/other.ckpt --write_full_pae --write_full_pde"
        ], 3, seed=None),
        "potentials": Wanted([f"{at}/steered --use_potentials --diffusion_samples 2"], 4),
        "affinity": Wanted([
            f"{again} --affinity_checkpoint {at}/other_affinity.ckpt",
            "remove predictions/binder/affinity_binder.json",
            again,
            f"{again} --seed 3",
        ], 1),
        "server": Wanted(
            [f"{at}/served.yaml --use_msa_server --msa_server_url {url}/{{side}}"],
            1, {"MSA_API_KEY_VALUE": "open sesame"},
        ),
        "again": Wanted([
            f"{at}/once/pair", f"{at}/twice/pair", f"{at}/twice/pair --override --seed 7",
            f"{at}/twice/pair --seed 8",
        ], 2),
        "boltz1": Wanted([f"{at}/first --model boltz1 --diffusion_samples 2"], 4),
    }  # fmt: skip


def prepare(at: Path, tiny_cache: Path) -> None:
    """Write all inputs and weights."""
    inputs.make_cache(at / "cache", tiny_cache)
    inputs.write_all(at / "all", at / "files")
    write_checkpoint(at / "other.ckpt", "tiny", "boltz2", seed=5)
    write_checkpoint(at / "other_affinity.ckpt", "tiny", "boltz2_affinity", seed=6)
    for name in ("odd_names", "steered", "once/pair", "twice/pair", "first"):
        (at / name).mkdir(parents=True)
    ligand = inputs.chain("ligand", "L", f"smiles: '{inputs.SMILES}'")
    a = inputs.protein("A", inputs.A, at / "files" / "a.csv")
    b = inputs.protein("B", inputs.B[:9])
    inputs.write(at / "small.yaml", a, ligand)
    inputs.write(at / "odd_names" / "two words.yaml", a)
    inputs.write(at / "odd_names" / "v1.2.yml", b, ligand)
    # One token: it has no pair.
    inputs.write(at / "odd_names" / "lonely.YAML", inputs.chain("ligand", "I", "ccd: MG"))
    inputs.write(at / "served.yaml", *(x.replace(", msa: empty", "") for x in (
        inputs.protein("[A, C]", inputs.A), b)))  # fmt: skip
    for folder, names in {"once": "x", "twice": "xy"}.items():
        for name in names:
            inputs.write(at / folder / "pair" / f"{name}.yaml", b, *[ligand] * (name == "y"))
    for name in ("held.yaml", "bonded.yml"):
        shutil.copy(at / "all" / name, at / "steered")
    for name in ("record.fasta", "bonded.yml"):
        shutil.copy(at / "all" / name, at / "first")


class Runs:
    """All commands of all sides, run once.

    Args:
        at: folder. cases: by name. ends: how they ended, by name and side. asked: of the server.
    """

    def __init__(self, at: Path, tiny_cache: Path) -> None:
        prepare(at, tiny_cache)
        with msa_server.serve() as served:
            self.at, self.cases = at, wanted(at, served.url)
            cases = {
                f"{name} {side}": self._case(name, case, side)
                for name, case in self.cases.items()
                for side in SIDES
            }
            self.ends: dict[str, Ended] = run_cases(cases, at)
            self.asked = served.asked

    def _case(self, name: str, case: Wanted, side: str) -> Case:
        out = self.out(name, side)

        def command(text: str) -> list[str]:
            data, *options = text.format(side=side).split()
            if data == "remove":
                return [data, f"{out}/boltz_results_binder/{options[0]}"]
            options = [x.replace("electron_microscopy", "electron microscopy") for x in options]
            places = ["--cache", f"{self.at}/cache", "--out_dir", str(out)]
            seed = [] if case.seed is None else ["--seed", str(case.seed)]
            return ["predict", data, *FAST.split(), *seed, *places, *options]

        return Case([command(text) for text in case.commands], SIDES[side], case.environ)

    def out(self, name: str, side: str) -> Path:
        """Folder of the results."""
        return self.at / "out" / name / side

    def results(self, name: str, side: str) -> Path:
        """Boltz's own folder in it."""
        (folder,) = self.out(name, side).glob("boltz_results_*")
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("predict"), tiny_cache)


@pytest.mark.parametrize("side", [side for side in SIDES if side != "stock"])
@pytest.mark.parametrize("name", wanted(Path(), ""))
def test_same_files_as_stock(name: str, side: str, runs: Runs) -> None:
    for which in ("stock", side):
        end = runs.ends[f"{name} {which}"]
        assert set(end.codes) == {0}, (which, end.codes, end.output[-4000:])
    assert f"foldcp {__version__}: {side} mesh, " in runs.ends[f"{name} {side}"].output
    results = runs.results(name, side)
    models = [*results.glob("predictions/*/*_model_*.cif"), *results.glob("*/*/*_model_*.pdb")]
    assert len(models) == runs.cases[name].models
    away = differences(results, runs.results(name, "stock"))
    far = {file: f"{gap:.1e}" for file, gap in away.items() if not gap <= TOLERANCE}
    assert not far, far


@pytest.mark.parametrize(
    ("name", "model", "samples"),
    [
        ("inputs", "boltz2", 1),
        ("options", "boltz2", 4),
        ("names", "boltz2", 1),
        ("boltz1", "boltz1", 2),
    ],
)
def test_results_as_arrays(name: str, model: str, samples: int, runs: Runs) -> None:
    """What `foldcp.Prediction` says of atoms and tokens, for every kind of input."""
    results = runs.results(name, "1x1")
    form = "pdb" if name == "names" else "mmcif"
    options = {"model": model, "diffusion_samples": samples, "output_format": form}
    options |= {"write_embeddings": name == "options", "write_full_pae": False}
    options["write_full_pde"] = False
    kinds: set[str] = set()
    for folder in (results / "predictions").iterdir():
        found = predictions.read(results, folder.name, options)
        tokens, atoms = found.tokens, found.atoms
        assert found.coords.shape == (samples, len(atoms), 3)
        assert found.plddt.shape == (samples, len(tokens))
        for matrices in (found.pae, found.pde) if model == "boltz2" else ():
            assert matrices.shape == (samples, len(tokens), len(tokens))
        files = [p for p in folder.glob("*_model_*.*") if p.suffix in (".cif", ".pdb")]
        structure = gemmi.read_structure(str(min(files)), merge_chain_parts=False)
        rows = [(c.name, r.seqid.num, r.name, a.name) for c in structure[0] for r in c for a in r]
        told = [tuple(row)[:4] for row in atoms.tolist()]
        assert form == "pdb" or told == rows
        assert [row[3] for row in told] == [row[3] for row in rows]
        # A token is a residue, or an atom of what has no sequence; Boltz-1: of what is modified.
        first = tokens["atom"]
        assert np.array_equal(first, np.r_[0, np.cumsum(tokens["atoms"])[:-1]])
        assert np.array_equal(atoms["token"][first], np.arange(len(tokens)))
        assert all(tokens["atoms"][tokens["kind"] == "ligand"] == 1)
        kinds |= set(tokens["kind"])
        assert bool(found.embeddings) == options["write_embeddings"]
        if name == "inputs" and folder.name == "binder":
            assert set(found.affinity) > {"affinity_pred_value"}
    assert kinds > {"protein"} and (name != "inputs" or len(kinds) == 4)


def test_only_one_rank_asks_the_server(runs: Runs) -> None:
    for side in SIDES:
        asked = [(mode, key) for client, mode, key in runs.asked if client == side]
        assert asked == [("pairgreedy-env", "open sesame"), ("env", "open sesame")], side


def test_what_is_finished_is_left_alone(runs: Runs) -> None:
    for side in ("1x1", "2x2"):
        said = [runs.ends[f"{name} {side}"].output for name in ("again", "affinity")]
        assert said[0].count("skipped as done in ") == 1
        # The last command finds nothing to do: no model is loaded, no start line printed.
        assert [text.count(f"foldcp {__version__}: ") for text in said] == [3, 2]
        assert said[0].count("nothing to do, all 2 predictions are there") == 1
        assert "nothing to do, all " in said[1]


B_FACTORS = {"steps": 2, "samples": 1, "recycling": 0, "extra": ["pbfactor"]}


def b_factors(mesh: Mesh, folder: Path) -> torch.Tensor | None:
    prepared = parity.prepare(folder, parity.EXAMPLES / "ubiquitin.yaml")
    model = parity.build_model(dtype=torch.float64)
    apply(model, mesh)
    feats = parity.compact_features(prepared)
    return parity.stock_outputs(model, feats, **B_FACTORS).get("pbfactor")


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2)])
def test_b_factors(session_folder: Path, rows: int, cols: int) -> None:
    # Boltz computes them and writes none.
    prepared = parity.prepare(session_folder, parity.EXAMPLES / "ubiquitin.yaml")
    stock = parity.build_model(dtype=torch.float64)
    theirs = parity.stock_outputs(stock, parity.stock_features(prepared), **B_FACTORS)["pbfactor"]
    ours = run(rows, cols, b_factors, session_folder)[0]
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    assert (ours - theirs).abs().max() < TOLERANCE
