"""How much the host is asked to do in one pairformer block, see bench/host_time.py: counts only."""

from __future__ import annotations

from bench.host_time import Worker
from bench.machine import ROOT

# (mesh, tokens) -> groups, packed messages, Triton launches at most. State 5ef7b97 had 63 launches
# on one GPU at 512 tokens, 131, 100, 79 on 2x2 at 1,024 and 379, 1,032, 111 on 2x4 at 2,048.
BOUNDS = {
    ((1, 1), 512): (0, 0, 15),
    ((2, 2), 1024): (20, 0, 25),
    ((2, 4), 2048): (94, 0, 55),
}


def test_a_block_asks_little_of_the_host() -> None:
    worker = Worker(ROOT, "this")
    for (mesh, n), bounds in BOUNDS.items():
        found = worker.measure("pairformer_block", n, *mesh, 0)
        seen = found["groups"], found["packed"], found["triton_launches"]
        assert all(a <= b for a, b in zip(seen, bounds, strict=True)), (mesh, n, seen, bounds)
        assert found["triton_launches"] >= 10  # it ran
        assert (found["groups"] > 0) == (mesh != (1, 1))
    worker.close()
