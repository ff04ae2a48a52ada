"""From Python: the documented program as it is typed, alone and on two ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
import pytest
from forked import Case, Ended, run_cases

ROOT = Path(__file__).parents[2]
INPUT = "{version: 1, sequences: [{protein: {id: A, sequence: MQIFVKT, msa: empty}}, %s]}"
LIGAND = "{ligand: {id: L, smiles: 'CC(N)C(=O)OC'}}"
FEW = {"sampling_steps": 5, "recycling_steps": 0}  # the documented program has Boltz's own numbers
# Runs after the documented program, in the same process.
MORE = """
import logging, os, random, signal, sys, threading, time
import numpy, torch, yaml
if result is not None:
    held = {key: getattr(result, key) for key in
            ("coords", "plddt", "pae", "pde", "atoms", "tokens", "pair_chains_iptm")}
    numpy.savez("result.npz", **held, **result.scores)
whole = yaml.safe_load(open("complex.yaml"))
threads = threading.active_count()
random.seed("of the program")
before = random.getstate(), sys.stdout, torch.is_grad_enabled(), logging.root.manager.disable
try:
    model.predict({"version": 1, "sequences": [{"protein": {"id": "A", "sequence": "MO1"}}]})
except foldcp.UserError as error:
    print("refused:", error, file=sys.stderr)
try:
    model.predict(whole, sed=1)
except TypeError as error:
    print("refused:", error, file=sys.stderr)
again = model.predict(whole, seed=1, diffusion_samples=2, out_dir="kept", name="again")
after = random.getstate(), sys.stdout, torch.is_grad_enabled(), logging.root.manager.disable
assert before == after, "the program's own state"
assert "PL_GLOBAL_SEED" not in os.environ, "the seed is left to Lightning"
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
assert signal.set_wakeup_fd(-1) == -1
if result is not None:
    assert numpy.array_equal(again.coords, result.coords), "the second prediction differs"
    assert os.path.exists("kept/boltz_results_again/predictions/again/again_model_1.cif")
    assert open("complex.cif").read() == result.structures[0]
time.sleep(0.5)
assert threading.active_count() <= threads, threading.enumerate()
"""


def program() -> str:
    """Read the program of docs/python-api.md, and give it few steps."""
    text = (ROOT / "docs/python-api.md").read_text().partition("## Use it from Python")[2]
    (found,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:1]
    return f"import foldcp\nfoldcp.Model.predict.__kwdefaults__.update({FEW})\n{found}"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, small_cache: Path) -> dict[str, Ended]:
    at = tmp_path_factory.mktemp("program")
    (at / "complex.yaml").write_text(INPUT % LIGAND)
    cases: dict[str, Case] = {}
    cached = {"BOLTZ_CACHE": str(small_cache), "TMPDIR": str(at / "temporary")}
    (at / "temporary").mkdir()
    options = [word for name, value in FEW.items() for word in (f"--{name}", str(value))]
    options += ["--accelerator", "cpu", "--seed", "1", "--diffusion_samples", "2"]
    for ranks in (1, 2):
        arguments = ["predict", str(at / "complex.yaml"), "--out_dir", str(at / f"files{ranks}")]
        cases[f"boltz {ranks}"] = Case([*arguments, *options], ranks, cached, rig="real")
        folder = at / f"work{ranks}"
        folder.mkdir()
        (folder / "complex.yaml").write_text(INPUT % LIGAND)
        everywhere = {rank: str(folder) for rank in range(ranks)}
        code = program() + MORE
        cases[f"program {ranks}"] = Case(
            [], ranks, cached, rank_folder=everywhere, rig="real", program=code
        )
    one = program().replace("complex.yaml", f"{at}/complex.yaml")
    for name, variables in {"mesh": {"FOLDCP_MESH": "2x2"}, "nproc": {"FOLDCP_NPROC": "4"}}.items():
        cases[name] = Case([], 1, {**cached, **variables}, rig="real", program=one)
    lost = "import os\nif os.environ['RANK'] == '1': raise ValueError('the program failed')\n"
    fails = "import foldcp.boltz.api.predictions as p\np.read = None\n"
    cases["root fails"] = Case([], 2, cached, rig="real", program=fails + one)
    cases["one leaves"] = Case(
        [], 2, {**cached, "FOLDCP_TIMEOUT": "3"}, rig="real", program=lost + one
    )
    ends = run_cases(cases)
    ends["at"] = at  # type: ignore[assignment]
    return ends


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_numbers_are_those_of_boltz_predict(ranks: int, ended: dict[str, Ended]) -> None:
    for name in (f"boltz {ranks}", f"program {ranks}"):
        assert set(ended[name].codes) == {0}, ended[name].stderr[0][-3000:]
    at: Path = ended["at"]  # type: ignore[assignment]
    folder = at / f"files{ranks}" / "boltz_results_complex" / "predictions" / "complex"
    found = np.load(at / f"work{ranks}" / "result.npz")
    for rank in (0, 1):
        stem = f"complex_model_{rank}"
        for key in ("plddt", "pae", "pde"):
            assert np.array_equal(found[key][rank], np.load(folder / f"{key}_{stem}.npz")[key])
        structure = gemmi.read_structure(str(folder / f"{stem}.cif"))
        rows = [(c, r, a) for c in structure[0] for r in c for a in r]
        at_files = np.array([a.pos.tolist() for _, _, a in rows], np.float32)
        assert np.array_equal(found["coords"][rank], at_files)
        told = [(c.name, r.seqid.num, r.name, a.name, a.element.name) for c, r, a in rows]
        assert [tuple(row)[:5] for row in found["atoms"].tolist()] == told
        plddt = found["plddt"][rank][found["atoms"]["token"]]
        assert np.allclose([a.b_iso for _, _, a in rows], 100 * plddt, atol=1e-3)
    text = (folder / "confidence_complex_model_1.json").read_text()
    assert f'"ptm": {found["ptm"][1]}' in text and found["pair_chains_iptm"].shape == (2, 2, 2)
    assert [kind for kind in found["tokens"]["kind"]] == 7 * ["protein"] + 7 * ["ligand"]
    assert not list((at / "temporary").glob("foldcp_predict_*")), "temporary files are left"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_program_goes_on_after_what_it_did_wrong(ranks: int, ended: dict[str, Ended]) -> None:
    for text in ended[f"program {ranks}"].stderr:
        (line,) = re.findall("refused: input.yaml: (.*)", text)
        assert "'1' at position 3 of the sequence of protein A" in line
        assert "or pass use_msa_server;" in line, "an option is an argument here"
        assert "boltz predict has no option sed, did you mean seed?" in text


def test_remedies_are_those_of_a_program(ended: dict[str, Ended]) -> None:
    for name in ("mesh", "nproc"):
        last = ended[name].stderr[0].strip().splitlines()[-1]
        assert ended[name].codes == [1] and last.startswith("foldcp.errors.UserError: "), last
        assert "`torchrun --nproc-per-node 4 program.py`" in last and "--nproc " not in last
        assert "Traceback" in ended[name].stderr[0] and "direct cause" not in ended[name].stderr[0]


def test_what_happens_to_one_rank_ends_all(ended: dict[str, Ended]) -> None:
    failed = ended["root fails"]
    assert failed.codes == [1, 1] and failed.seconds < 30
    assert any("rank 0 failed" in line and "all ranks end" in line for line in failed.messages())
    assert not any("of the same command" in line for line in failed.messages())
    left = ended["one leaves"]
    assert left.codes == [1, 1] and left.seconds < 30, left.stderr[0][-2000:]


def test_importing_costs_nothing_and_shows_what_is_public() -> None:
    code = (
        "import sys, foldcp\n"
        "assert not {'torch', 'numpy', 'boltz'} & set(sys.modules)\n"
        "assert dir(foldcp) == sorted(foldcp.__all__)\n"
        "assert foldcp.load and foldcp.Prediction and dir(foldcp) == sorted(foldcp.__all__)\n"
        "import foldcp_kernels\n"
        "assert dir(foldcp_kernels) == sorted(foldcp_kernels.__all__)\n"
        "assert all(callable(getattr(foldcp_kernels, name)) for name in foldcp_kernels.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
