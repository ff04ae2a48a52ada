"""Errors of low-precision formats in real dimensions, bounded by the table of what was measured."""

from __future__ import annotations

import csv
from unittest import mock

import pytest
import torch

from bench import precision
from bench.precision import CONTRACTION, FORMATS, INPUTS, OUT, TOKENS, UPDATE
from foldcp_kernels.triangle_multiplication import fp8, parts

SLACK = 1.3  # of the table; below it a format would not be the one that is named
CEILING = {"bf16": 0.009, "fp8": 0.045}
# One number in a whole plane rounds one way everywhere: nothing averages out.
ABOVE = ("all 1e-30",)


def written() -> dict[tuple[str, str, str], float]:
    with OUT.open() as file:
        rows = list(csv.DictReader(file))
    return {(r["site"], r["format"], r["inputs"]): float(r["error"]) for r in rows}


def beyond(kind: str, inputs: str) -> list[str]:
    """The sites whose error is not that of the table."""
    table, found = written(), precision.measure(inputs, kind)
    return [
        f"{site}: {error:.4f}, {known:.4f} in the table"
        for site, error in found.items()
        for known in (table[site, kind, inputs],)
        if not known / SLACK <= error <= known * SLACK
    ]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_errors_are_those_of_the_table(inputs: str, kind: str) -> None:
    assert not beyond(kind, inputs)


def test_the_table_keeps_the_ceilings() -> None:
    found = {key: e for key, e in written().items() if key[2] not in ABOVE}
    assert len(found) == len(FORMATS) * (len(INPUTS) - len(ABOVE)) * 2
    over = {key: e for key, e in found.items() if e > CEILING[key[1]]}
    assert not over


def test_a_doubled_scale_is_seen() -> None:
    scales = fp8.product_scales
    with mock.patch.object(fp8, "product_scales", lambda *w: 2 * scales(*w)):
        assert any(x.startswith(CONTRACTION) for x in beyond("fp8", "plain"))


def test_scales_that_underflow_are_seen() -> None:
    scales = fp8.channel_scales
    with mock.patch.object(fp8, "channel_scales", lambda *w: 2**12 * scales(*w)):
        assert len(beyond("fp8", "plain")) == 2


def test_planes_that_are_not_rounded_are_seen() -> None:
    with mock.patch.object(fp8, "DTYPE", torch.bfloat16):
        assert len(beyond("fp8", "plain")) == 2
    with mock.patch.object(torch, "autocast", lambda *_: torch.no_grad()):
        assert len(beyond("bf16", "plain")) == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_is_not_a_number_stays_so_and_stays_where_it_is(value: float) -> None:
    case = precision.plain()
    case.z[0, 5, 9] = value
    case.z[0, 5, 9, ::2] *= -1
    same, low = (precision.results(case, kind) for kind in FORMATS)
    for site in (CONTRACTION, UPDATE):
        broken = same[site].isnan()
        assert torch.equal(low[site].isnan(), broken), site
        assert not broken[:, TOKENS // 2, TOKENS // 2].any()
        rest = ~broken
        assert precision.error(low[site][rest], same[site][rest].double()) < CEILING["fp8"]


def test_planes_of_a_dead_row_are_zero() -> None:
    case = precision.drawn("masked row")
    with torch.no_grad():
        chosen = parts.choose_parts(case.z, case.op(), "torch", "fp8")
        ab = parts.project_planes(case.z, case.mask, case.op(), chosen)
    assert (ab[:, :, TOKENS // 2].float() == 0).all()
