"""The whole-model benchmark: order of runs, what becomes of those that die, and what is judged."""

from __future__ import annotations

import time

import pytest
import torch

from bench import predict, predict_sides


def test_predictions_go_on_after_a_process_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def communicate(command: list[str], end: float, take) -> str:
        runs = command[command.index("--runs") + 1]
        asked.append(runs)
        for n, side, k in (r.split(":") for r in runs.split(",")):
            if (n, side, k) == ("512", "stock", "1") or len(asked) == 3:
                return "timeout" if len(asked) == 3 else "CUDA error"
            row = {"status": "oom"} if n == "1024" else {"status": "ok", "seconds": 2.0}
            take({"n": int(n), "side": side, "round": int(k), "checksum": 1.0} | row)
        return "exit 0"

    monkeypatch.setattr(predict, "_communicate", communicate)
    monkeypatch.setattr(predict, "KERNEL_PACKAGE", "torch")
    runs = predict.schedule([256, 512, 1024], ["foldcp", "stock"], 2)
    assert runs[:6] == [
        (256, "foldcp", 0), (256, "stock", 0), (256, "foldcp", 1), (256, "stock", 1),
        (256, "stock", 2), (256, "foldcp", 2),
    ]  # fmt: skip
    kept: list[int] = []
    rows = predict.run(runs, [], 0.0, lambda rows: kept.append(len(rows)))
    assert kept == sorted(kept) and len(asked) == 2 and "512:stock" not in asked[1]
    table = {(r["n"], r["side"]): r for r in predict.judged(rows, 0.05)}
    assert [r["status"] for r in table.values()] == ["ok", "ok", "failed", "ok", "oom", "oom"]
    assert table[512, "stock"]["reason"] == "CUDA error" and table[512, "foldcp"]["runs"] == 2
    late = predict.run([(2048, "foldcp", 1)], [], time.time() + 60, lambda rows: None)
    assert late[0]["status"] == "skipped"


def test_a_prediction_that_is_not_stocks_gets_no_time() -> None:
    def row(side: str, k: int, **more: object) -> dict:
        return {"n": 256, "side": side, "round": k, "status": "ok"} | more

    timed = [row("stock", k, checksum=1.0, seconds=x) for k, x in ((1, 2.0), (2, 4.0))]
    ours = [row("foldcp", k, checksum=1.01, seconds=1.0, peak_mib=k) for k in (1, 2)]
    check = row("foldcp", predict.CHECK, structure=0.01, structure_bound=0.02)
    stock, found = predict.judged([check, *timed, *ours], 0.05)
    assert (stock["seconds"], stock["fastest"], stock["slowest"], stock["runs"]) == (
        3.0,
        2.0,
        4.0,
        2,
    )
    assert (found["status"], found["speedup_over_stock"], found["peak_mib"]) == ("ok", 3.0, 2)
    for wrong, reason in (
        ([check, *timed, *[r | {"checksum": 2.0} for r in ours]], "off stock's"),
        ([check | {"status": "wrong", "reason": "structure"}, *timed, *ours], "structure"),
    ):
        stock, found = predict.judged(wrong, 0.05)
        assert found["status"] == "wrong" and reason in found["reason"]
        assert found["seconds"] == found["speedup_over_stock"] == "" and stock["seconds"] == 3.0


def test_superposition_sees_shapes_and_not_places() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(50, 3, generator=g)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    turn[:, 0] *= torch.sign(torch.det(turn))
    moved = a.double() @ turn + 7
    assert predict_sides.superposed(moved, a) < 1e-6
    assert (
        predict_sides.superposed(moved * torch.tensor([1.0, 1.0, -1.0]), a) > 0.1
    )  # a mirror image
    assert 0.05 < predict_sides.superposed(a * 1.1, a) < 0.15


def test_a_run_that_does_not_fit_is_skipped() -> None:
    done = [
        {"side": "stock", "n": 256, "seconds": 2.0},
        {"side": "stock", "n": 512, "seconds": 10.0},
    ]
    assert predict_sides.expected(512, "stock", done) == 10.0
    assert predict_sides.expected(1024, "stock", done) == 40.0
    assert predict_sides.expected(1024, "foldcp", done) == 0.0
