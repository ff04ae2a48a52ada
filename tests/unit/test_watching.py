"""What a run shows while it works and at its end, on a terminal and in a file."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import foldcp_boot
from foldcp import __version__
from foldcp.fabric.mesh import Mesh
from foldcp.runtime import report
from foldcp.runtime.screen import summary
from foldcp.runtime.screen.console import Console, Log, Screened, is_news, put
from foldcp.runtime.screen.progress import clock
from foldcp.runtime.screen.quiet import one_voice
from foldcp.runtime.screen.watching import Watching

COSTS = {"seconds": 83.0, "peak_rss_bytes": [2.5e9, 3.25e9], "peak_gpu_bytes": [0, 0]}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(screen: io.StringIO, groups: int = 1, elsewhere: int = 0) -> tuple[Watching, list[str]]:
    """A watching of rank 0, and the stages that other ranks would hear of."""
    stages: list[str] = []
    store = SimpleNamespace(add=lambda key, amount: elsewhere)
    session = SimpleNamespace(at=stages.append, store=store, groups=groups, group=0, is_root=True)
    return Watching(session, Console(screen, Log(None))), stages


def fold(watching: Watching, now: list[float]) -> list[float]:
    """Two inputs with a pass a second each; returns the shares that were told."""
    shares = []
    with mock.patch("foldcp.runtime.screen.progress.time.monotonic", lambda: now[0]):
        for name in ("a", "b"):
            way = watching.begin(name, 1000, passes=2, steps=4, samples=1, rated=1)
            for stage, total in (
                ("input embedding", 1), ("recycle 1/2", 2), ("recycle 2/2", 2),
                ("conditioning", 1), ("diffusion", 4), ("confidence", 1),
            ):  # fmt: skip
                for done in range(total + 1):
                    way.update(stage, done, total)
                    shares.append(way.fraction)
                    now[0] += 0.5
            way.end()
            watching.finished(writes=True)
    return shares


def test_shares_rise_to_the_whole_and_time_is_learned() -> None:
    watching, stages = watched(io.StringIO())
    shares = fold(watching, [0.0])
    assert watching.pace.keys() == {"recycle", "diffusion", "confidence"}
    # 1000 tokens: a pass is 157 TFLOP; the second input knows from the first what it takes.
    assert watching.pace["recycle"] == pytest.approx(3 / (2 * 157), rel=0.2)
    first, second = shares[: len(shares) // 2], shares[len(shares) // 2 :]
    for told in (first, second):
        assert told == sorted(told) and told[0] == 0 and told[-1] == pytest.approx(1.0)
    assert stages[1] == "recycle 1/2 of a" and stages[-1] == "confidence of b"
    assert [clock(s) for s in (7.4, 80, 7380)] == ["0:07", "1:20", "2:03:00"]


def test_a_terminal_has_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    watching, _ = watched(screen)
    watching.expect(2)
    with mock.patch("foldcp.runtime.screen.console._EVERY", (-1.0, 30.0)):
        fold(watching, [0.0])
    told = screen.getvalue()
    assert "\n" not in told and all(len(s) < 80 for s in told.split("\r\x1b[K"))
    assert "input 2 of 2, b: trunk 2/2 [" in told and "] 100 %" in told and ", 0:0" in told
    watching._console.say("stays")
    assert screen.getvalue().endswith("\r\x1b[Kstays\n")


def test_a_file_has_plain_lines() -> None:
    screen = io.StringIO()
    watching, _ = watched(screen, groups=2, elsewhere=3)
    watching.expect(7)
    with mock.patch("foldcp.runtime.screen.console.time.monotonic", lambda: 0.0):
        fold(watching, [0.0])
    watching.wait()
    *lines, waiting = screen.getvalue().splitlines()
    assert not set("\r\x1b") & set(screen.getvalue())
    assert [line.partition(", ")[2].partition(",")[0] for line in lines] == [
        f"{name}: {stage}"
        for name in "ab"
        for stage in ("trunk 1/2", "trunk 2/2", "sampling 0/4", "confidence")
    ]
    assert lines[0].startswith("foldcp: 3 of 7 inputs done, a") and "4 of 7" in lines[4]
    assert waiting.startswith("foldcp: 5 of 7 inputs done, other groups are at work, 71 %")


def test_lines_of_others_are_screened_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(  # pytest's records
        warnings, "showwarning", lambda *told: print(told[0], file=sys.stderr)
    )
    for verbose in (False, True):
        with one_voice(tmp_path, verbose), warnings.catch_warnings():
            warnings.simplefilter("always")
            print("Checking input data.\nNumber of failed examples: 0\nan MSA server is down\n")
            print("Password: ", end="", flush=True)
            print("", flush=True)
            logging.getLogger("pytorch_lightning").error("TPU available: False")
            warnings.warn("LeafSpec is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("the driver is too old", UserWarning, stacklevel=1)
            try:
                raise KeyError("of one input")
            except KeyError:
                traceback.print_exc()
        out, err = capsys.readouterr()
        assert ("failed examples" in out, "TPU" in out + err) == (verbose, False)
        assert ("LeafSpec" in err, "KeyError" in err) == (verbose, verbose)
        assert "an MSA server is down\n" in out and "Password: \n" in out and "too old" in err
        kept = (tmp_path / "foldcp.log").read_text()
        for said in ("Checking input", "MSA server", "TPU", "LeafSpec", "KeyError: 'of one input'"):
            assert said in kept
    assert kept.count("\n--- ") == 1 and sys.argv[0] in kept  # one header for each run
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "foldcp.log").symlink_to(tmp_path / "elsewhere")
    with one_voice(tmp_path / "link", False):
        print("said")
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_costs_the_log_only() -> None:
    console = Console(io.StringIO(), Log(Path("/dev/full")))
    screened = Screened(io.StringIO(), console, is_news)
    print("news", file=screened)
    assert screened.stream.getvalue() == "news\n"


def test_a_prediction_goes_on_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:  # as after `| head -1`
        for text in ("a\n", "b\n"):
            put(stream, text)
    for name in ("stdout", "stderr"):  # as after `>&-`
        monkeypatch.setattr(sys, name, None)
    foldcp_boot.open_streams()
    assert sys.stdout.write("a") == sys.stderr.write("b") == 1
    for told in (put, lambda stream, text: foldcp_boot.open_streams() or stream.write(text)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
        told(sys.stdout, "\u540d of an input")
        sys.stdout.flush()
        assert sys.stdout.buffer.getvalue() == b"\\u540d of an input"


@pytest.mark.parametrize("columns", [20, 40, 79, 200])
def test_a_long_name_leaves_room_for_the_rest(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("x" * 200, "\u540d" * 60, "input 2 of 3, " + "e\u0301" * 100):
        screen = Terminal()
        Console(screen, Log(None)).show(f"{name}: sampling 4/5", 0.94, "0:07 left", fresh=True)
        shown = screen.getvalue().removeprefix("\r\x1b[K")
        cells = len(shown) + shown.count("\u540d") - shown.count("\u0301")
        assert cells <= columns - 1 and shown.startswith("foldcp: ")
        if columns > 39:
            assert ": sampling 4/5" in shown and shown.endswith("94 %, 0:07 left"), shown


def test_the_summary_says_what_there_is(tmp_path: Path) -> None:
    for name in ("ab", "c"):
        (tmp_path / "predictions" / name).mkdir(parents=True)
    told = '{"confidence_score": 0.91, "complex_plddt": 0.8, "ptm": 0.7, "iptm": 0.25}'
    (tmp_path / "predictions" / "ab" / "confidence_ab_model_0.json").write_text(told)
    told = '{"affinity_pred_value": -1.5, "affinity_probability_binary": 0.75}'
    (tmp_path / "predictions" / "c" / "affinity_c.json").write_text(told)
    said = summary.lines(tmp_path, ["ab", "c"], ["c"], skipped=3, failed=1, costs=COSTS)
    assert said == [
        "2 folded, 1 with affinity, 1 failed, 3 skipped as done in 1:23, peak memory 3.25 GB "
        "per rank",
        "  ab  confidence 0.910  pLDDT 0.800  pTM 0.700  ipTM 0.250",
        "  c   affinity -1.500  binder 0.750",
        f"results: {tmp_path / 'predictions'}",
    ]
    assert summary.shortened(said) == said
    (nothing,) = summary.lines(tmp_path, [], [], 3, 0, COSTS)
    assert nothing.startswith("nothing to do, all 3 predictions are there")
    many = summary.lines(tmp_path, [f"x{i}" for i in range(50)], [], 0, 0, COSTS)
    short = summary.shortened(many)
    assert len(short) == 23 and short[-2:] == ["  and 30 more, all of them in foldcp.log", many[-1]]


def test_the_start_line_fits() -> None:
    alone = Mesh.create(1, 1, torch.device("cpu"))
    assert report.start_line(alone, "fp32", sizes=[76]) == (
        f"foldcp {__version__}: 1x1 mesh, 1 CPU rank, fp32, 76 tokens"
    )
    gpus = SimpleNamespace(
        rows=16, cols=16, size=256, device=torch.device("cuda"), transport="copy-engine"
    )
    said = report.start_line(gpus, "bf16", "srun", 1, [12000], True)
    assert "256 GPU ranks (srun), bf16, lean memory, copy-engine transport" in said
    said = report.start_line(gpus, "bf16", "mpirun (Open MPI)", 4, [76] * 9999 + [12000])
    assert "4 groups of 16x16 mesh, 1024 GPU ranks (mpirun (Open MPI)), bf16" in said
    assert said.endswith("\nfoldcp: copy-engine transport, 10,000 inputs of 76 to 12,000 tokens")
    assert all(len(line) <= 100 for line in said.splitlines())
    four = SimpleNamespace(rows=2, cols=2, size=4, device=torch.device("cpu"), transport="host")
    said = report.start_line(four, "fp32", "torchrun", 1, [76])
    assert said.endswith("2x2 mesh, 4 CPU ranks (torchrun), fp32, host transport, 76 tokens")
    assert len(said) <= 100
    assert "one process is faster" in report.hint(four, [76]) and not report.hint(four, [900])
    assert not report.hint(alone, [76]) and not report.hint(gpus, [76])
