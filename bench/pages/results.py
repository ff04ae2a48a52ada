"""Blocks generated from the tables under bench/results."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

from bench import aot, occupancy
from bench.machine import ROOT
from foldcp.fabric.exchange.timeline import Interval, hidden

RESULTS = ROOT / "bench" / "results"
MODELLED = "modelled, not measured"
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """Read a table of bench/results.

    Args:
        name: its path below that folder.
    """
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def source(name: str, how: str = "measured") -> str:
    """Say which file a table comes from, on which machine and at which commit it was made.

    Args:
        name: path of the file below bench/results.
        how: measured, counted, compiled or modelled.
    """
    found = rows(name)
    machines = sorted({re.sub(r" x(\d+)$", r" (\1 cores)", r["machine"]) for r in found})
    commits = sorted({r["commit"] for r in found})
    versions = sorted({f"torch {r['torch']}, Boltz {r['boltz']}" for r in found})
    return (
        f"**{how.capitalize()}.** `bench/results/{name}`, made on {' and '.join(machines)}, "
        f"commit {', '.join(commits)}, {', '.join(versions)}."
    )


def markdown(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Lay out a table.

    Args:
        head: titles of the columns.
        body: cells of each row.
    """
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def vs_stock() -> str:
    """Compare one foldcp process with stock Boltz on a CPU."""
    head = ("tokens", "runs", "time, stock", "time, foldcp", "memory, stock", "memory, foldcp")
    body = [
        (r["tokens"], r["runs"], f"{float(r['stock_seconds']):.1f} s",
         f"{float(r['foldcp_seconds']):.1f} s ({float(r['seconds_ratio']):.2f}x)",
         f"{float(r['stock_peak_mib']):,.0f} MiB",
         f"{float(r['foldcp_peak_mib']):,.0f} MiB ({float(r['peak_mib_ratio']):.2f}x)")
        for r in rows("cpu/vs_stock.csv")
    ]  # fmt: skip
    return f"{markdown(head, body)}\n\n{source('cpu/vs_stock.csv')}"


def loading() -> str:
    """Compare the loading of Boltz-2's weights."""
    head = ("", "ranks", "load", "load and look at every weight", "private memory")
    body = [
        (r["side"], r["ranks"], f"{float(r['load_s']):.1f} s", f"{float(r['checked_s']):.1f} s",
         f"{int(r['private_bytes']) / 1e9:.2f} GB")
        for r in rows("cpu/loading.csv")
    ]  # fmt: skip
    return f"{markdown(head, body)}\n\n{source('cpu/loading.csv')}"


def outputs() -> str:
    """Compare the writing of a PAE matrix."""
    head = ("", "tokens", "host memory", "next sample held up", "until written", "file")
    body = [
        (r["side"], f"{int(r['n']):,}", f"{float(r['extra_mib']):.0f} MiB", f"{r['held_s']} s",
         f"{r['all_s']} s", f"{float(r['file_mib']):.0f} MiB")
        for r in rows("cpu/outputs.csv")
    ]  # fmt: skip
    return f"{markdown(head, body)}\n\n{source('cpu/outputs.csv')}"


def steering() -> str:
    """Compare the evaluation of steering potentials."""
    head = ("", "atoms", "samples", "spacing", "memory", "energy", "gradient", "list of all pairs")
    body = [
        (r["side"], f"{int(r['atoms']):,}", r["samples"], f"{r['spacing_angstrom']} A",
         f"{float(r['extra_mib']):,.0f} MiB", f"{r['energy_s']} s", f"{r['gradient_s']} s",
         f"{int(r['all_pairs_mib']):,} MiB")
        for r in rows("cpu/steering.csv")
    ]  # fmt: skip
    return f"{markdown(head, body)}\n\n{source('cpu/steering.csv')}"


def transports() -> str:
    """Tabulate the time of a ring of three steps per transport."""
    times: dict[str, dict[str, str]] = defaultdict(dict)
    for r in rows("cpu/transports.csv"):
        times[r["bytes"]][r["transport"]] = f"{float(r['ms']):.2g} ms"
    names = sorted({name for found in times.values() for name in found}, reverse=True)
    body = [(f"{int(n):,}", *(found[name] for name in names)) for n, found in times.items()]
    head = ("bytes of a message", *(f"`{name}`" for name in names))
    return f"{markdown(head, body)}\n\n{source('cpu/transports.csv')}"


def planning() -> str:
    """Tabulate what planning and choosing strategies takes on square meshes."""
    times: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for r in rows("cpu/planning.csv"):
        ms = float(r["cpu_ms"])
        times[r["task"], r["op"]][r["mesh"]] = f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
    meshes = list(next(iter(times.values())))
    body = [(task, _op(op), *(found[m] for m in meshes)) for (task, op), found in times.items()]
    return f"{markdown(('', 'op', *meshes), body)}\n\n{source('cpu/planning.csv')}"


def overlap() -> str:
    """Tabulate the part of a rank's transfers that math hides, from the recorded timelines."""
    ranks: dict[str, dict[tuple[str, str], list[Interval]]] = defaultdict(lambda: defaultdict(list))
    for r in rows("cpu/rings/timeline.csv"):
        bar = Interval(r["kind"], r["label"], int(r["step"]), int(r["start"]), int(r["end"]))
        ranks[r["op"]][r["strategy"], r["rank"]].append(bar)
    body = []
    for op, found in ranks.items():
        parts = [hidden(bars) for bars in found.values()]
        names = ", ".join(f"`{name}`" for name in sorted({name for name, _ in found}))
        body.append((_op(op), names, f"{min(parts):.0%} to {max(parts):.0%}"))
    table = markdown(("op", "strategy", "hidden part of transfers, over ranks"), body)
    return f"{table}\n\n{source('cpu/rings/timeline.csv')}"


def wire() -> str:
    """Tabulate what the FP8 wire saves and costs."""
    head = ("op", "strategy", "bytes, of raw", "error of the update, rms")
    body = [
        (_op(r["op"]), f"`{r['strategy']}`", f"{int(r['fp8_bytes']) / int(r['raw_bytes']):.2f}",
         f"{float(r['off_rms']):.2%}")
        for r in sorted(rows("cpu/wire.csv"), key=lambda r: r["op"], reverse=True)
    ]  # fmt: skip
    return f"{markdown(head, body)}\n\n{source('cpu/wire.csv')}"


def host_time() -> str:
    """Tabulate the host time of a pairformer block, beside the state it was compared with."""
    pairs: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for r in rows("host/host_time.csv"):
        if r["part"] == "pairformer_block":
            pairs[r["mesh"], r["tokens"]][r["state"]] = r
    (before,) = {state for found in pairs.values() for state in found} - {"this"}
    names = ("groups", "packed", "triton_launches", "host_ms")
    body = []
    for (mesh, tokens), found in pairs.items():
        cells = [f"{float(found['this'][x]):,.3g} ({float(found[before][x]):,.4g})" for x in names]
        body.append((mesh, f"{int(tokens):,}", *cells))
    head = ("mesh", "N", "groups", "packed messages", "Triton launches", "host, ms")
    text = f"In brackets: state {before} in the same run."
    return f"{text}\n\n{markdown(head, body)}\n\n{source('host/host_time.csv')}"


def live() -> str:
    """Tabulate live bytes of each stage on one rank and on the largest of 2x2."""
    most: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for r in rows("memory/live.csv"):
        if (r["tokens"], r["sequences"], r["samples"]) == ("2048", "1", "1"):
            case = f"{r['kernels']}, {r['mesh']}"
            most[r["stage"]][case] = max(most[r["stage"]][case], float(r["bytes_per_pair"]))
    cases = ("torch, 1x1", "torch, 2x2", "triton, 1x1", "triton, 2x2")
    body = []
    for stage, found in most.items():
        cells = [f"{found[c]:,.0f}" for c in cases]
        if stage == "overall":
            for i in (1, 3):
                cells[i] += f" ({found[cases[i]] / found[cases[i - 1]]:.2f}x)"
        body.append((stage.replace("_", " "), *cells))
    return f"{markdown(('stage', *cases), body)}\n\n{source('memory/live.csv', 'counted')}"


def mesh_memory() -> str:
    """Tabulate modelled bytes of a rank over tokens and meshes."""
    body = [
        (f"{int(r['tokens']):,}", r["mesh"], f"{int(r['activation_bytes_modelled']) / 1e9:.1f}",
         f"{int(r['weight_bytes']) / 1e9:.1f}", f"{int(r['bytes_modelled']) / 1e9:.1f}")
        for r in rows("memory/meshes.csv")
    ]  # fmt: skip
    head = ("tokens", "mesh", "activations, GB", "weights, GB", "in all, GB")
    return f"{markdown(head, body)}\n\n{source('memory/meshes.csv', MODELLED)}"


def flat_memory() -> str:
    """Tabulate the counted bytes of a pair in every stage over meshes, in lean and fast memory."""
    stages = ("pairformer", "msa", "conditioning", "sampling", "confidence")
    body = [
        (f"{int(r['tokens']):,}", r["mesh"], r["rank"], r["memory"],
         *(f"{int(r[f'{name}_bytes_per_pair']):,}" for name in stages),
         f"{int(r['bytes']) / 2**30:.1f}", f"{int(r['allowed_bytes']) / 2**30:.1f}")
        for r in rows("memory/flat.csv")
    ]  # fmt: skip
    head = ("tokens", "mesh", "rank", "memory", *stages, "peak, GiB", "bound of lean, GiB")
    return f"{markdown(head, body)}\n\n{source('memory/flat.csv', 'counted')}"


def tile_memory() -> str:
    """Tabulate counted bytes of a rank of 2x2 over gloo."""
    body = [
        (r["mesh"], r["rank"], f"{float(r['pair_share']):.2f}x", f"{float(r['all_share']):.2f}x")
        for r in rows("memory/tiles.csv")
    ]
    head = ("mesh", "rank", "pair tensors, of 1x1", "all large tensors, of 1x1")
    return f"{markdown(head, body)}\n\n{source('memory/tiles.csv', 'counted')}"


def traffic() -> str:
    """Tabulate received tiles per rank and scheme."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for r in rows("traffic/strategies.csv"):
        found[r["op"], r["scheme"]][r["gpus"]] = f"{float(r['tiles_mean']):.2f}"
    counts = sorted({p for cells in found.values() for p in cells}, key=int)
    body = [(_op(op), scheme, *(cells[p] for p in counts)) for (op, scheme), cells in found.items()]
    head = ("op", "scheme", *(f"P = {p}" for p in counts))
    return f"{markdown(head, body)}\n\n{source('traffic/strategies.csv', 'counted from the plans')}"


def rings_model() -> str:
    """Tabulate the modelled cost of what `auto` takes on H100 GPUs."""
    head = ("GPUs", "N", "op", "strategy", "math, ms", "in all, ms", "overlap", "received, GB")
    chosen = [
        r for r in rows("rings/model.csv")
        if r["auto"] and r["chip"] == "H100" and r["wire"] == "raw"
        and r["local"] in ("1024", "2048")
    ]  # fmt: skip
    order = ["triangle_multiplication", "triangle_attention"]
    chosen.sort(key=lambda r: (int(r["gpus"]), int(r["tokens"]), order.index(r["op"])))
    body = [
        (r["gpus"], f"{int(r['tokens']):,}", _op(r["op"]), f"`{r['strategy']}`",
         f"{float(r['compute_ms_modelled']):.1f}", f"{float(r['total_ms_modelled']):.1f}",
         f"{float(r['efficiency_modelled']):.1%}", f"{int(float(r['received_bytes'])) / 1e9:.2f}")
        for r in chosen
    ]  # fmt: skip
    return f"{markdown(head, body)}\n\n{source('rings/model.csv', MODELLED)}"


def crossover() -> str:
    """Tabulate the tile side above which triangle multiplication hides its transfers."""
    body = [
        (r["chip"], r["link"], r["mesh"], f"`{r['strategy']}`", r["wire"],
         r["local_modelled"] or "never")
        for r in rows("rings/crossover.csv") if r["op"] == "triangle_multiplication"
    ]  # fmt: skip
    head = ("chip", "link", "mesh", "strategy", "wire", "tokens per tile side")
    return f"{markdown(head, body)}\n\n{source('rings/crossover.csv', MODELLED)}"


def stage_time() -> str:
    """Tabulate the modelled seconds of the complex that Fold-CP reports."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for r in rows("model/stage_time.csv"):
        found[r["stage"]][r["gpus"]] = f"{float(r['total_s_modelled']):.2f}"
    gpus = list(found["total"])
    body = [(stage.replace("_", " "), *(of[x] for x in gpus)) for stage, of in found.items()]
    head = ("stage, s", *gpus)
    return f"{markdown(head, body)}\n\n{source('model/stage_time.csv', MODELLED)}"


def sizes(cards: Collection[str] = (), counts: Collection[str] = ()) -> str:
    """Tabulate the largest inputs by cards and GPUs, all of them where none are named."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for r in rows("model/sizes.csv"):
        if cards and r["card_gb"] not in cards or counts and r["gpus"] not in counts:
            continue
        line = found[f"{r['card_gb']} GB"]
        mark = "" if r["stock_from"] == "reported" else " (scaled)"
        line["stock, 1 GPU"] = f"{int(r['stock_tokens']):,}{mark}"
        line[f"{r['gpus']} GPU{'s' * (r['gpus'] != '1')}"] = f"{int(r['tokens']):,}"
    names = list(next(iter(found.values())))
    body = [(card, *(of[x] for x in names)) for card, of in found.items()]
    return f"{markdown(('card', *names), body)}\n\n{source('model/sizes.csv', MODELLED)}"


def few_sizes() -> str:
    """Tabulate the largest inputs of common machines."""
    return sizes(("24", "80", "141"), ("1", "4", "8", "64"))


def cpu_validation() -> str:
    """Tabulate modelled and measured totals of predictions on CPU ranks."""
    body = [
        (r["tokens"], r["mesh"], r["role"], r["modelled_s"], r["core_s"], r["clock_s"],
         f"{float(r['error']):+.0%}")
        for r in rows("model/cpu_validation.csv") if r["item"] == "total"
    ]  # fmt: skip
    head = ("N", "mesh", "role", "modelled, s", "cores, s", "clock, s", "error by cores")
    return f"{markdown(head, body)}\n\n{source('model/cpu_validation.csv')}"


def roofline() -> str:
    """Tabulate floors and predictions of the two triangle ops on an H100."""
    body = [
        (_op(r["op"]), f"{int(r['n']):,}", r["roofline_ms_modelled"], r["bound_modelled"],
         r["predicted_ms_modelled"], r["target_at_most_ms"] or "")
        for r in rows("roofline.csv")
        if r["chip"] == "H100" and r["dtype"] == "bf16" and r["n"] in ("1024", "2048", "4096")
        and r["op"] in ("triangle_attention_core", "triangle_multiplication")
    ]  # fmt: skip
    head = ("op", "N", "floor, ms", "bound by", "predicted, ms", "target, ms")
    return f"{markdown(head, body)}\n\n{source('roofline.csv', MODELLED)}"


def compiled() -> str:
    """Tabulate what the kernels compile to."""
    found = rows("aot.csv")
    spills = sum(int(r["spills"] or 0) > 0 for r in found)
    text = f"{len(found)} compiled variants, {spills} of them with spills."
    return f"{text}\n\n{aot.table(found)}\n\n{source('aot.csv', 'compiled, not run')}"


def chosen() -> str:
    """Tabulate the candidates of the four largest kernels, as modelled."""
    return f"{occupancy.table()}\n\n{source('aot.csv', MODELLED)}"


def _op(name: str) -> str:
    return name.replace("_", " ")


BLOCKS: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        vs_stock, loading, outputs, steering, transports, planning, overlap, wire, host_time,
        live, mesh_memory, flat_memory, tile_memory, traffic, rings_model, crossover, roofline,
        compiled, chosen, stage_time, cpu_validation, sizes, few_sizes,
    )
}  # fmt: skip
