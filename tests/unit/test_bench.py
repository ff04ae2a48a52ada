"""The benchmark itself: what it measures is checked first, and its figures are what they say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import (
    eager,
    kernels,
    machine,
    plots,
    predict,
    providers,
    rings_model,
    roofline,
    shapes,
    timing,
)
from foldcp.cli import main as cli

CPU = torch.device("cpu")
TINY = ("triangle_attention_core", "triangle_multiplication", "transition_single", "adaptive_norm")
COLUMNS = [
    "op", "n", "dtype", "provider", "status", "ms", "p20", "p80", "tflops", "gbs", "roofline_ms",
    "roofline_fraction", "bound", "peak_mib", "error", "error_at", "reason", "machine", "commit",
]  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def few_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SEQUENCES, "cpu", 3)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_op_agrees_with_float64_and_is_timed(
    tmp_path: Path, few_sequences: None, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "FEWEST", 2)
    out = tmp_path / "kernels.csv"
    assert kernels.main(["--n", "12", "--budget", "0", "--out", str(out)]) == 0
    rows = read(out)
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    assert {r["op"] for r in rows} == set(shapes.OPS) == set(eager.EAGER)
    for row in rows:
        case = f"{row['op']} {row['provider']}: {row['reason']}"
        if row["op"] not in providers.FOLDCP and row["provider"] != "eager":
            assert row["status"] == "unavailable", case
            continue
        assert row["status"] == "ok", case
        assert 0 < float(row["p20"]) <= float(row["ms"]) <= float(row["p80"]), case
        assert float(row["gbs"]) > 0 and float(row["error"]) <= 4e-5, case
        assert row["bound"] == row["peak_mib"] == "", case  # of a GPU


def test_low_precision_passes_its_own_bound(few_sequences: None) -> None:
    clock = timing.Clock(CPU)
    for dtype in ("bf16", "fp16"):
        for op in TINY:
            chosen = {name: providers.PROVIDERS[name] for name in ("eager", "foldcp-torch")}
            for row in kernels.run_case(shapes.OPS[op], 8, dtype, clock, chosen, 0.0):
                assert row["status"] == "ok", f"{op} {dtype} {row['provider']}: {row['reason']}"
                assert float(row["error"]) > 1e-5, "low precision cannot be that exact"


def _wrong(op: str, t: shapes.Inputs) -> providers.Call:
    """Half of the update, which leaves shapes and magnitudes as they are."""
    call, z = providers.stock(op, t), t["z"]
    return lambda: z + 0.5 * (call() - z)


def _empty(op: str, t: shapes.Inputs) -> providers.Call:
    return lambda: torch.full_like(t["z"], torch.nan)


def _broken(op: str, t: shapes.Inputs) -> providers.Call:
    def run() -> Tensor:
        raise RuntimeError("no kernel image is available")

    return run


def _large(op: str, t: shapes.Inputs) -> providers.Call:
    raise torch.OutOfMemoryError("out of memory")


def test_a_provider_that_fails_its_check_gets_no_time(capsys: pytest.CaptureFixture) -> None:
    op = shapes.OPS["triangle_multiplication"]
    added = {"wrong": _wrong, "nan": _empty, "broken": _broken, "large": _large}
    chosen = {"eager": providers.PROVIDERS["eager"]} | added
    rows = kernels.run_case(op, 16, "fp32", timing.Clock(CPU), chosen, 0.0)
    found = {r["provider"]: r for r in rows}
    status = {name: r["status"] for name, r in found.items()}
    assert status == {
        "eager": "ok", "wrong": "wrong", "nan": "wrong", "broken": "failed", "large": "oom"
    }  # fmt: skip
    for name in added:
        assert not any(found[name][k] for k in ("ms", "p20", "p80", "tflops", "roofline_fraction"))
    assert 0.4 < float(found["wrong"]["error"]) < 0.6
    kernels.say(rows)
    said = capsys.readouterr().out.splitlines()[1:]
    assert [" ms" in line for line in said] == [True, False, False, False, False]


def test_a_large_case_is_checked_at_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHECK_N", 8)

    def wrong_beyond_the_small_case(op: str, t: shapes.Inputs) -> providers.Call:
        return (_wrong if t["z"].shape[1] > 8 else providers.stock)(op, t)

    op, chosen = shapes.OPS["triangle_multiplication"], {"late": wrong_beyond_the_small_case}
    (row,) = kernels.run_case(op, 16, "fp32", timing.Clock(CPU), chosen, 0.0)
    assert row["status"] == "wrong" and row["error_at"] == 16 and row["ms"] == ""


def test_ops_in_place_leave_the_inputs_of_the_others_alone() -> None:
    op = shapes.OPS["transition_single"]
    t = op.make(shapes.Draw(torch.float32, CPU), 8)
    before = t["x"].clone()

    def add_one() -> Tensor:
        return t["x"].add_(1)

    truth = (before + 1).double()
    assert kernels.error_of(op, add_one, t, truth) < 1e-6
    assert torch.equal(t["x"], before)


def test_roofline_of_hand_computed_cases() -> None:
    h100, h200 = (roofline.chip_named(f"NVIDIA {x}") for x in ("H100 80GB HBM3", "H200"))
    assert h100 is not None and h200 is not None and roofline.chip_named("Radeon") is None
    # 16 exponentials a clock on 132 SMs at 1.755 GHz; N^3 for each of four heads.
    core = roofline.floor("triangle_attention_core", 1024, 2, h100)
    assert core.bound == "exp"
    assert core.ms == pytest.approx(1e3 * 4 * 1024**3 / (16 * 132 * 1.755e9))
    (work,) = roofline.kernels("triangle_attention_core", 1024, 2)
    assert work.flops == 2 * 2 * 4 * 32 * 1024**3
    assert work.bytes == 2 * (4 * 1024**2 * 128 + 4 * 1024**2)
    # Three kernels on an H200, known from elsewhere: 0.72, 4.28 and 28.3 ms.
    for n, known in ((1024, 0.72), (2048, 4.28), (4096, 28.3)):
        assert roofline.floor("triangle_multiplication", n, 2, h200).ms == pytest.approx(
            known, rel=0.01
        )
    # A head reads its tile once and writes one float a pair.
    head = roofline.floor("pae_head", 512, 2, h200)
    pairs = 512**2
    parts = {
        "memory": pairs * (128 * 2 + 4) / 4.3e9,
        "tensor": 2 * pairs * 128 * 64 / 790e9,
        "exp": pairs * 64 / (16 * 132 * 1.755e6),
    }
    assert head.bound == max(parts, key=parts.__getitem__)
    assert head.ms == pytest.approx(max(parts.values()))
    assert h100.tensor_rate(4) == pytest.approx(798e12 / 6)  # three passes at half the rate
    with pytest.raises(ValueError, match="`op` must be one of"):
        roofline.kernels("nothing", 8, 2)


def test_roofline_table_marks_what_is_modelled_and_what_is_published(tmp_path: Path) -> None:
    roofline.main(["--out", str(tmp_path / "roofline.csv")])
    rows = read(tmp_path / "roofline.csv")
    assert len(rows) == len(shapes.OPS) * len(roofline.SIZES) * 2
    by_case = {(r["op"], int(r["n"]), r["chip"]): r for r in rows}
    core = by_case["triangle_attention_core", 2048, "H100"]
    assert core["target_at_most_ms"] == core["best_triton_ms_published"] == "21.6"
    assert by_case["triangle_attention_core", 2048, "H200"]["target_aim_ms"] == ""
    for row in rows:
        least, expected = (float(row[f"{x}_ms_modelled"]) for x in ("roofline", "predicted"))
        assert 0 < least < expected
    committed = read(machine.ROOT / "bench" / "results" / "roofline.csv")
    modelled = [k for k in rows[0] if k.endswith(("modelled", "published")) or "target" in k]
    assert [[r[k] for k in modelled] for r in rows] == [[r[k] for k in modelled] for r in committed]


def test_percentiles_and_turns() -> None:
    assert timing.percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert timing.percentile([5.0], 0.2) == 5.0
    assert timing.percentile([float(x) for x in range(11)], 0.8) == 8.0
    turns: list[str] = []
    calls = {name: lambda x=name: turns.append(x) for name in "abc"}
    found = timing.interleaved(timing.Clock(CPU), calls, budget_s=0)
    assert {t.repeats for t in found.values()} == {timing.FEWEST}
    timed = turns[3 * timing.WARM_UP :]
    assert [timed[3 * i] for i in range(4)] == ["a", "b", "c", "a"]
    assert all(sorted(timed[3 * i : 3 * i + 3]) == ["a", "b", "c"] for i in range(5))


class _Device:
    """A GPU with its own timeline, in ms: launches cost the host time and the device other time."""

    def __init__(self) -> None:
        self.now = self.free = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(device.now, device.free)

            def query(self) -> bool:
                return device.now >= self.at

            def synchronize(self) -> None:
                device.now = max(device.now, self.at)

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        self.Event = Event

    def launch(self, host: float, ms: float) -> None:
        """Enqueue one kernel of `ms` in `host` ms."""
        self.now += host
        self.free = max(self.now, self.free) + ms

    def wait(self) -> None:
        """What reading a result does."""
        self.now = max(self.now, self.free)


def test_times_of_short_kernels_are_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty launches of 0.05 ms each: a fixed head start of 0.3 ms would time the host's 2 ms."""
    gpu = _Device()
    monkeypatch.setattr(timing.torch.cuda, "Event", gpu.Event)
    monkeypatch.setattr(timing.torch.cuda, "_sleep", lambda n: gpu.launch(0.01, n / 1.7e6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.now / 1e3)
    clock = timing.Clock(CPU)
    clock.cuda, clock.flush = True, torch.empty(1)

    def short() -> None:
        for _ in range(40):
            gpu.launch(0.05, 0.004)

    def waits() -> None:
        gpu.launch(0.05, 0.5)
        gpu.wait()
        gpu.launch(0.05, 0.5)

    found = timing.interleaved(clock, {"short": short, "waits": waits}, budget_s=0)
    assert found["short"].ms == pytest.approx(40 * 0.004)
    assert found["short"].late == 0 and found["short"].remark() == ""
    assert found["waits"].late == found["waits"].repeats  # and no endless search
    assert "the host was late in 5 of 5 repeats" in found["waits"].remark()


def test_plots_are_drawn_from_tables(tmp_path: Path) -> None:
    columns = "op,n,dtype,provider,status,ms,roofline_ms,machine,commit"
    lines = [
        f"core,{n},bf16,{who},{status},{ms},0.1,here,abc"
        for n in (256, 512)
        for who, status, ms in (("foldcp", "ok", n / 100), ("eager", "wrong", ""))
    ]
    (tmp_path / "kernels.csv").write_text("\n".join([columns, *lines]) + "\n")
    roofline.main(["--out", str(tmp_path / "roofline.csv")])
    (tmp_path / "other.csv").write_text("a\n1\n")
    made = plots.draw(tmp_path)
    assert [p.name for p in made] == ["kernels.png", "roofline.png"]
    sizes = [p.stat().st_size for p in made]
    assert min(sizes) > 5000
    first = made[0].read_bytes()
    made[0].unlink()
    plots.draw(tmp_path)
    assert made[0].read_bytes() == first


def test_bench_command_says_where_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ["--op", "adaptive_norm", "--n", "4", "--budget", "0", "--providers", "eager"]
    for rows in ("model_rows", "traffic_rows", "crossover_rows"):  # which take long
        monkeypatch.setattr(rings_model, rows, list)
    written: list[Path] = []
    monkeypatch.setattr(rings_model, "write_csv", lambda path, rows: written.append(path))
    for arguments in (["kernels", *chosen], ["rings", "--model"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", *arguments])
        assert ended.value.code == 0
    assert read(tmp_path / "foldcp_bench" / "kernels.csv")
    assert written[0] == Path("foldcp_bench/rings/model.csv")
    assert predict._parser("cpu").get_default("out") == Path("foldcp_bench/predict.csv")
    assert "foldcp_bench" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="expects one of kernels, block, predict, rings, tune, got 'all'"
    ):
        cli.main(["bench", "all"])
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "foldcp" / "cli" / "main.py"))
    with pytest.raises(SystemExit, match="foldcp bench needs a clone"):
        cli.main(["bench", "all"])


def test_a_machine_without_boltz_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise machine.PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    machine.describe.cache_clear()
    try:
        assert machine.describe()["boltz"] == machine.describe()["torch"] == "none"
    finally:
        machine.describe.cache_clear()
