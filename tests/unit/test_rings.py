"""`foldcp bench rings`: the timeline of a run, and the documented table of the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from bench import rings
from bench.machine import ROOT
from foldcp.fabric.exchange.timeline import Interval, hidden


@pytest.mark.process
@pytest.mark.parametrize("strategies", [("panel-direct", "panel-direct"), ("channel", "rows")])
def test_timeline_of_two_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture, strategies: tuple[str, str]
) -> None:
    ops = ("triangle_multiplication", "triangle_attention")
    for op, name in zip(ops, strategies, strict=True):
        shape = ["--mesh", "1x2", "--tokens", "96", "--channels", "32", "--op", op]
        assert rings.main([*shape, "--strategy", name, "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert f"1x2, N = 96, host, {name}" in said and "hidden under math" in said
        with (tmp_path / "timeline.csv").open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["op"] == op]
        for rank in "01":
            mine = [r for r in rows if r["rank"] == rank]
            assert {r["kind"] for r in mine} == {"math", "transfer"}
            assert all(int(r["start"]) <= int(r["end"]) for r in mine)
        events = json.loads((tmp_path / f"{op}.json").read_text())["traceEvents"]
        bars = [e for e in events if e["ph"] == "X"]
        assert len(bars) == len(rows)
        assert min(e["ts"] for e in bars) == 0 and all(e["dur"] >= 0 for e in bars)
        assert (tmp_path / f"{op}.png").stat().st_size > 5000


def test_hidden_fraction() -> None:
    def bar(kind: str, start: int, end: int) -> Interval:
        return Interval(kind, "op", 0, start, end)

    math = [bar("math", 10, 20), bar("math", 30, 40)]
    assert hidden(math) == 1
    assert hidden([*math, bar("transfer", 20, 30)]) == 0
    assert hidden([*math, bar("transfer", 12, 18), bar("transfer", 15, 35)]) == 16 / 26


def test_documentation_has_the_table_of_the_model(capsys: pytest.CaptureFixture) -> None:
    assert rings.main(["--model", "--table"]) == 0
    table = capsys.readouterr().out.strip()
    assert "modelled, not measured" in table
    rows = [line for line in table.splitlines() if line[:1] == "|" and line[2].isdigit()]
    page = (ROOT / "docs/results/rings-model.md").read_text()
    assert len(rows) == 16 and [row for row in rows if row not in page] == []
