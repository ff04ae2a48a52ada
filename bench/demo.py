"""Fold ubiquitin with stock Boltz and with foldcp on a mesh: `python -m bench.demo`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foldcp.compare import TOLERANCES, compare, find, read, table

ROOT = Path(__file__).parent.parent
INPUT = ROOT / "examples" / "ubiquitin.yaml"
WORK = ROOT / ".demo"
GB = 1e9
# One process holds 507 M float32 weights and, while it loads them, the checkpoint as well.
REAL_BYTES_PER_RANK = 5 * GB
SYNTHETIC = """\
weights: SYNTHETIC, size {size}, made on the spot. They are untrained, so the structure means
  nothing; that both runs give the same one does. For the real weights let Boltz download them once
  (boltz predict {input} --use_msa_server); they are picked up from {cache}."""


@dataclass(frozen=True)
class Run:
    """One finished run of Boltz.

    Args:
        results: Boltz's results folder.
        seconds: wall time, start-up and loading included.
        peak_bytes: peak resident memory per process; a single value is that of the largest one.
        sent_bytes: bytes sent per rank; empty when not reported.
        start_line: what foldcp says it swapped; empty for stock.
    """

    results: Path
    seconds: float
    peak_bytes: list[int]
    sent_bytes: list[int]
    start_line: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0 when both runs agree, 1 when they differ beyond tolerance, 2 when one failed.
    """
    options = _parse(argv)
    cache = options.cache or choose_cache(options)
    arguments = [
        "predict", str(INPUT), "--cache", str(cache), "--accelerator", "cpu", "--override",
        "--recycling_steps", str(options.recycling), "--sampling_steps", str(options.steps),
        "--seed", str(options.seed), "--num_workers", "0",
    ]  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    ranks, rows_cols = options.nproc, options.mesh
    try:
        print(f"\n[1/2] stock boltz, 1 process, {cores} threads, float32 (stock's default on a CPU")
        print("      is bfloat16, so bench/stock.py sets Lightning's precision to 32)", flush=True)
        stock = execute(
            "stock",
            [sys.executable, "-m", "bench.stock", "--peak", str(WORK / "stock.json"), *arguments],
            {"OMP_NUM_THREADS": str(cores)},
        )
        threads = max(1, cores // ranks)
        mesh = {
            "FOLDCP": "1",
            "FOLDCP_NPROC": str(ranks),
            "FOLDCP_MESH": rows_cols,
            "FOLDCP_PRECISION": "fp32",
        }
        shown = " ".join(f"{key}={value}" for key, value in mesh.items())
        print(f"\n[2/2] {shown} boltz predict ..., {threads} thread per rank", flush=True)
        ours = execute(
            "mesh",
            [str(Path(sys.executable).with_name("boltz")), *arguments],
            {**mesh, "OMP_NUM_THREADS": str(threads), "FOLDCP_REPORT": str(WORK / "mesh.json")},
        )
        if not ours.start_line:
            raise RuntimeError("FOLDCP=1 changed nothing, so the second run was stock Boltz too; "
                               "install foldcp into this environment: make setup")  # fmt: skip
        (mine,), (other,) = (find(run.results).values() for run in (ours, stock))
        found = compare(read(mine), read(other))
    except (RuntimeError, FileNotFoundError, ValueError) as error:  # UserError is a RuntimeError
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 2
    print(f"      {ours.start_line}")
    print(f"\n{'':22}{'stock':>16}{f'mesh {rows_cols}':>16}")
    print(f"{'time':22}{stock.seconds:14.1f} s{ours.seconds:14.1f} s")
    print(f"{'peak memory per rank':22}{_gigabytes(stock.peak_bytes):>16}"
          f"{_gigabytes(ours.peak_bytes):>16}")  # fmt: skip
    if ours.sent_bytes:
        print(f"{'sent per rank':22}{'0 MB':>16}{max(ours.sent_bytes) / 1e6:13.1f} MB")
    print(f"({ranks} ranks share {cores} cores here, and the memory is mostly Python, torch and "
          "weights;\na mesh pays on GPUs and large complexes)\n")  # fmt: skip
    print(table(found))
    print(f"\nstock: {stock.results}/predictions\nmesh:  {ours.results}/predictions")
    # One seed gives one frame: they agree as they are written, too.
    agree = found.same and found.as_written <= TOLERANCES["coords"].largest
    print("\nsame structure" if agree else "\nthe two runs DIFFER beyond tolerance")
    return 0 if agree else 1


def choose_cache(options: argparse.Namespace) -> Path:
    """Return Boltz's own cache when it holds weights that fit here, else a synthetic one.

    Args:
        options: `size` and `nproc` of the command line.
    Returns:
        A folder for `--cache`; says what was chosen and why.
    """
    own = Path(os.environ.get("BOLTZ_CACHE") or "~/.boltz").expanduser()
    needed, free = REAL_BYTES_PER_RANK * options.nproc, _available_memory()
    if options.size is None and (own / "boltz2_conf.ckpt").exists():
        if free >= needed:
            print(f"weights: the real ones, from {own}")
            return own
        print(f"weights: {own} holds the real ones, but {options.nproc} ranks need about "
              f"{needed / GB:.0f} GB of memory and {free / GB:.0f} GB are free.")  # fmt: skip
        print(f"  Use them with --cache {own} --nproc 2 --mesh 1x2.")
    size = options.size or "tiny"
    cache = WORK / f"cache-{size}"
    print(SYNTHETIC.format(size=size, input=INPUT.relative_to(ROOT), cache=own), flush=True)
    if size == "tiny" or not (cache / "boltz2_aff.ckpt").exists():  # which is written last
        from bench.synthetic import make_cache  # takes seconds to import, Boltz and RDKit

        make_cache(cache, size, ("boltz2",))
    return cache


def execute(name: str, command: Sequence[str], variables: Mapping[str, str]) -> Run:
    """Run Boltz once with its output in `.demo/<name>` and `.demo/<name>.log`.

    Args:
        name: "stock" or "mesh".
        command: the command line, without `--out_dir`.
        variables: environment on top of this process's, from which FOLDCP_* is removed.
    Returns:
        What the run left and cost.
    Raises:
        RuntimeError: it ended with a non-zero code; carries the end of its log.
    """
    out, log, report = WORK / name, WORK / f"{name}.log", WORK / f"{name}.json"
    shutil.rmtree(out, ignore_errors=True)
    report.unlink(missing_ok=True)
    WORK.mkdir(exist_ok=True)
    env = {key: value for key, value in os.environ.items() if not key.startswith("FOLDCP")}
    start = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--out_dir", str(out)], env={**env, **variables}, cwd=ROOT,
            stdout=stream, stderr=subprocess.STDOUT,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)  # counts the processes it waited for too
        process.returncode = code = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    lines = log.read_text(errors="replace").splitlines()
    if code != 0:
        raise RuntimeError(f"the {name} run ended with code {code}; the end of {log}:\n"
                           + "\n".join(lines[-25:]))  # fmt: skip
    numbers = json.loads(report.read_text()) if report.exists() else {}
    return Run(
        results=out / f"boltz_results_{INPUT.stem}",
        seconds=seconds,
        peak_bytes=numbers.get("peak_rss_bytes") or [usage.ru_maxrss * 1024],
        sent_bytes=numbers.get("sent_bytes") or [],
        start_line=next((line for line in lines if line.startswith("foldcp:")), ""),
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--cache", type=Path, help="Boltz cache to use as it is")
    parser.add_argument("--size", choices=("tiny", "real"),
                        help="synthetic weights of this size, not the real ones")  # fmt: skip
    parser.add_argument("--nproc", type=int, default=4, help="ranks (4)")
    parser.add_argument("--mesh", default="2x2", help="rows x columns (2x2)")
    parser.add_argument("--recycling", type=int, default=1, help="recycling steps (1)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (25)")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


def _available_memory() -> float:
    """Bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable; name the weights with --cache")


def _gigabytes(values: Sequence[int]) -> str:
    low, high = min(values) / GB, max(values) / GB
    return f"{high:.2f} GB" if high - low < 0.005 else f"{low:.2f}-{high:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
