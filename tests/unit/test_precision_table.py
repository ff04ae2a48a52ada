"""FOLDCP_PRECISION: presets, single groups, and combinations that no code runs."""

from __future__ import annotations

import pytest

from foldcp.config import Config
from foldcp.config.precision import FORMATS, PRESETS, Precision, read
from foldcp.fabric.policy import Policy


def test_presets_and_changes() -> None:
    assert read("bf16").table() == {
        "pair": "bf16", "contraction": "bf16", "msa": "bf16",
        "single": "fp32", "tokens": "fp32", "atoms": "fp32",
    }  # fmt: skip
    changed = read("TF32, tokens=bf16")
    assert (changed.single, changed.tokens, changed.atoms) == ("tf32", "bf16", "tf32")
    assert read("fp8").contraction == "fp8" and read("fp8").single == "tf32"
    assert read("fp32,pair=bf16") == PRESETS["bf16"], "what follows pair goes along"
    assert read("fp8,pair=fp32").contraction == "fp8"
    assert read("fp8,contraction=bf16") == PRESETS["tf32"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("change", ["", "single=bf16", "tokens=fp32", "contraction=fp8"])
def test_descriptions_read_back(name: str, change: str) -> None:
    table = read(f"{name},{change}".rstrip(","))
    assert read(table.described()) == table


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fp64", "begin with fp32 or bf16 or tf32 or fp8"),
        ("bf16,token=tf32", "groups are pair, contraction, msa, single, tokens, atoms"),
        ("bf16,tokens", "is not GROUP=FORMAT"),
        ("bf16,tokens=fp8", "tokens runs in fp32 or tf32 or bf16, not in fp8"),
        ("bf16,msa=fp32", "format of pair, bf16, not in fp32"),
        ("fp32,contraction=bf16", "format of pair, fp32, or in fp8, not in bf16"),
        ("", "there is no precision ''"),
    ],
)
def test_what_no_code_runs_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(text)
    if text:
        with pytest.raises(
            ValueError, match=f"FOLDCP_PRECISION must be auto or a precision, got .*{said}"
        ):
            Config.from_env({"FOLDCP_PRECISION": text})


def test_a_policy_takes_the_formats_of_its_groups() -> None:
    for group in ("single", "tokens", "atoms"):
        for form in FORMATS[group]:
            assert getattr(Policy(**{group: form}), group) == form
        with pytest.raises(ValueError, match=group):
            Policy(**{group: "fp8"})


def test_auto_is_todays() -> None:
    assert Config().precision_on("cuda") == PRESETS["bf16"]
    assert Config().precision_on("cpu") == Precision()
    assert PRESETS["tf32"].needs_gpu == ("single", "tokens", "atoms")
