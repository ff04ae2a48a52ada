"""`foldcp plan` on inputs, and the same count before every prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import Case, Ended, run_cases
from parity import EXAMPLES

from foldcp.cli.plan import command

INPUT = "{version: 1, sequences: [{protein: {id: A, sequence: MQIFVKT, msa: empty}}]}"
# The host seems to have a few bytes. The command itself is what Boltz's hook has switched over.
SMALL = """
import boltz.main
import foldcp.fabric.memory as memory
memory.host_memory = lambda: (10**6, 10**6)
boltz.main.cli()
"""
KEYS = {
    "name", "tokens", "atoms", "msa_rows", "templates", "samples", "model", "notes", "fits", "mesh",
    "memory", "strategies", "needed_bytes", "weights_bytes", "assumed_bytes", "stage_bytes",
    "modelled_seconds", "assumptions", "would_fit",
}  # fmt: skip


@pytest.fixture
def planned(small_cache: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = command.main([*map(str, arguments), "--cache", str(small_cache)])
        return (code, *capsys.readouterr())

    return run


def test_examples_are_counted_as_the_tokeniser_counts(planned: Any, prepared: Any) -> None:
    names = ["heterodimer", "tetramer", "constraints"]
    paths = [EXAMPLES / f"{name}.yaml" for name in names]
    code, out, _ = planned(*paths, "--gpus", "8xh100-80", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["gpus"]["memory_bytes"] == 80 * 10**9
    for name, one in zip(names, found["inputs"], strict=True):
        feats = prepared(name).dataset()[0]
        assert set(one) == KEYS and one["name"] == name
        assert one["tokens"] == feats["token_index"].shape[0]
        assert one["atoms"] == int(feats["atom_pad_mask"].sum())
        assert one["msa_rows"] >= feats["msa"].shape[0]
        assert one["stage_bytes"].keys() == one["modelled_seconds"].keys()
        assert one["needed_bytes"] > max(one["stage_bytes"].values()) > 0


def test_without_a_dictionary_the_document_is_counted(
    planned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("heterodimer", "constraints", "template", "ubiquitin"):
        arguments = [str(EXAMPLES / f"{name}.yaml"), "--gpus", "h100", "--json"]
        with_it = json.loads(planned(*arguments)[1])["inputs"][0]
        assert command.main([*arguments, "--cache", str(tmp_path)]) == 0
        without = json.loads(capsys.readouterr()[0])["inputs"][0]
        for key in ("tokens", "atoms", "msa_rows", "templates"):
            assert with_it[key] == without[key], (name, key)
        assert not with_it["notes"] and "without Boltz's parser" in without["notes"][0]
    path = str(EXAMPLES / "tetramer.yaml")
    assert command.main([path, "--gpus", "h100", "--cache", str(tmp_path)]) == 2
    assert "name its folder with --cache" in capsys.readouterr()[1]


def test_what_does_not_fit_ends_with_one_and_what_would(planned: Any) -> None:
    sizes = ("--tokens", 12_000, "--atoms", 90_000, "--msa", 512)
    code, out, _ = planned(*sizes, "--gpus", "2xrtx4090")
    assert (
        code == 1 and "DOES NOT FIT 2xrtx4090-24" in out and "it would fit with 8 of these" in out
    )
    code, out, _ = planned(*sizes, "--gpus", "2xrtx4090", "--json")
    (one,) = json.loads(out)["inputs"]
    assert code == 1 and not one["fits"] and one["msa_rows"] == 512
    assert all(x["needed_bytes"] > 0 and x["mesh"] and x["gpus"] for x in one["would_fit"])
    code, out, _ = planned(*sizes, "--gpus", "8xh100")
    assert code == 0 and "modelled, not measured" in out and "H100: 798 TFLOP/s" in out


def test_the_exact_count_is_near_the_formula(planned: Any) -> None:
    sizes = ("--tokens", 512, "--msa", 64, "--gpus", "h100", "--json")
    formula, exact = (
        json.loads(planned(*sizes, *more)[1])["inputs"][0] for more in ((), ("--exact",))
    )
    assert exact["stage_bytes"] != formula["stage_bytes"]
    assert exact["needed_bytes"] == pytest.approx(formula["needed_bytes"], rel=0.05)


def test_bad_use_is_one_clear_error(planned: Any, tmp_path: Path) -> None:
    bad, empty, wrong = tmp_path / "bad.yaml", tmp_path / "empty", tmp_path / "wrong.txt"
    bad.write_text(INPUT.replace("MQIFVKT", "MQ1"))
    wrong.write_text("")
    empty.mkdir()
    sizes = ("--tokens", 100)
    for arguments, says in [
        ((*sizes, "--gpus", "8xh1000"), "did you mean h100?"),
        (("--tokens", -5, "--gpus", "h100"), "tokens must be at least 1, got -5"),
        ((*sizes, "--msa", -5, "--gpus", "h100"), "sequences must be at least 1, got -5"),
        ((*sizes, "--gpus", "4xh100", "--mesh", "3x3"), "needs 9 GPUs"),
        ((*sizes, "--gpus", "h100", "--diffusion_samples", 0), "--diffusion_samples must be"),
        ((*sizes, "--gpus", "h100", "--tken", 1), "No such option"),
        ((*sizes, bad, "--gpus", "h100"), "not both"),
        (("--gpus", "h100"), "give an input"),
        (("--atoms", 4, "--gpus", "h100"), "go with --tokens"),
        ((tmp_path / "none.yaml", "--gpus", "h100"), "does not exist"),
        ((empty, "--gpus", "h100"), "there is no input"),
        ((wrong, "--gpus", "h100"), "not an input"),
        ((bad, "--gpus", "h100"), "'1' at position 3"),
    ]:
        code, out, err = planned(*arguments)
        assert code == 2 and not out, arguments
        assert says in err and err.startswith("foldcp: ") and len(err.splitlines()) == 1, err


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, small_cache: Path) -> dict[str, Ended]:
    at = tmp_path_factory.mktemp("capacity")
    (at / "one.yaml").write_text(INPUT)
    cases = {}
    for name, ranks, force in [("alone", 1, ""), ("two", 2, ""), ("forced", 2, "1")]:
        arguments = ["predict", str(at / "one.yaml"), "--out_dir", str(at / name)]
        arguments += ["--accelerator", "cpu", "--sampling_steps", "3", "--recycling_steps", "0"]
        variables = {"BOLTZ_CACHE": str(small_cache), "FOLDCP_FORCE": force}
        cases[name] = Case(arguments, ranks, variables, rig="real", program=SMALL)
    return {**run_cases(cases), "at": at}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["alone", "two"])
def test_what_cannot_fit_is_left_out_before_it_is_folded(
    name: str, ended: dict[str, Ended]
) -> None:
    text = "\n".join(ended[name].stderr + ended[name].stdout)
    assert set(ended[name].codes) != {0}
    assert "7 tokens need about" in text and "of this host's memory has 0.00" in text, text[-3000:]
    assert "FOLDCP_FORCE=1 folds it nevertheless" in text and "foldcp plan INPUT" in text
    at: Path = ended["at"]  # type: ignore[assignment]
    assert not list(at.glob(f"{name}/*/predictions/one/*.cif"))


def test_force_folds_it(ended: dict[str, Ended]) -> None:
    assert ended["forced"].codes == [0, 0], ended["forced"].stderr[0][-3000:]
    at: Path = ended["at"]  # type: ignore[assignment]
    (found,) = at.glob("forced/*/predictions/one/plddt*.npz")
    assert np.load(found)["plddt"].shape == (7,)
