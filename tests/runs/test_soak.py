"""A long run does not grow: the soak at a small count, and that it would see each kind of leak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.soak import PLANTS, growth, sample

pytestmark = pytest.mark.soak
COUNT = 12


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.soak` on ranks that share one process group."""
    return subprocess.run(
        [sys.executable, "-m", "bench.soak", "--count", str(COUNT), *arguments],
        env={**os.environ, "FOLDCP": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_many_predictions_leave_nothing_behind() -> None:
    ended = soak("--mesh", "2x2")
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert "nothing grows" in ended.stdout
    assert all(f"rank {rank}" in ended.stdout for rank in range(4))


def test_each_planted_leak_is_seen() -> None:
    ended = soak("--mesh", "1x2", "--plant", *PLANTS)
    assert ended.returncode == 1, ended.stdout + ended.stderr[-2000:]
    grown = [line.split()[2] for line in ended.stdout.splitlines() if line.endswith("GROWS")]
    assert sorted(set(grown)) == sorted(sample()), grown


@pytest.mark.parametrize("every", [1, 5])
def test_a_rare_leak_is_seen_in_a_long_run(every: int) -> None:
    steady = {"rss_bytes": 5e8, "objects": 5e5, "handles": 40, "threads": 9, "maps": 2, "keys": 30}
    samples = [{**steady, "handles": 40 + i // every + i % 2} for i in range(200)]
    found = growth(samples)
    before, after, allowed = found["handles"]
    assert after - before > allowed
    assert all(last - first <= most for first, last, most in (found[k] for k in ("maps", "keys")))
