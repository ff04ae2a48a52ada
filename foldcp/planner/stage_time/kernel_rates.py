"""Hold what kernels reach of a chip's rates: assumed, or read from a table of measurements.

A table is `bench/results/<machine>/rates.csv`. Its columns:

    kernel      one of `KERNELS`, or "link" or "host"
    fraction    of the chip's stated rates that the kernel reaches; of "link" that of the stated
                bytes per second; of "host" the seconds of the host over those of `rates.py`
    seconds, flops, bytes, exps, itemsize
                of a run of the kernel, in place of a fraction

Other columns, as those that name the machine, are left alone. A kernel with several rows counts by
the geometric mean of them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp, fsum, isfinite, log
from pathlib import Path

from foldcp.planner.rates import EXP, LINK, MEMORY, TENSOR, Chip, Link, Links

# Families of kernels: those of a family are bound by the same things.
KERNELS = (
    "triangle_multiplication",
    "triangle_attention",
    "transition",
    "pair_rows",
    "attention_pair_bias",
    "outer_product_mean",
    "pair_weighted_averaging",
    "linear",
    "atom_attention",
    "elementwise",
)
_OTHERS = ("link", "host")


@dataclass(frozen=True)
class KernelRates:
    """Shares of stated rates that kernels reach.

    Args:
        fractions: of the stated rates that a kernel reaches; one that is missing is assumed.
        origin: where they come from.
    """

    fractions: Mapping[str, float] = field(default_factory=dict)
    origin: str = "assumed"

    def chip(self, chip: Chip, kernel: str) -> Chip:
        """Return the chip as a kernel finds it, so that its rates lead to the measured seconds.

        Args:
            chip: with stated rates.
            kernel: one of `KERNELS`.
        """
        slower = replace(chip, host=chip.host * self.fractions.get("host", 1.0))
        if kernel not in self.fractions:
            return slower
        f = self.fractions[kernel]
        return replace(
            slower,
            tflops=chip.tflops * f / TENSOR,
            float32_tflops=chip.float32_tflops * f / TENSOR,
            tbs=chip.tbs * f / MEMORY,
            gexps=chip.gexps * f / EXP,
        )

    def links(self, links: Links) -> Links:
        """Return the links as messages find them.

        Args:
            links: with stated rates.
        """
        if "link" not in self.fractions:
            return links

        def slower(link: Link) -> Link:
            return replace(link, gbs=link.gbs * self.fractions["link"] / LINK)

        return replace(links, near=slower(links.near), far=slower(links.far))

    def described(self) -> list[str]:
        """List every rate with its origin, a line each."""
        assumed = f"{TENSOR} of products, {MEMORY} of memory, {EXP} of exponentials: assumed"
        lines = [
            f"{name}: {self.fractions[name]:.3g} of the stated rates ({self.origin})"
            if name in self.fractions
            else f"{name}: {assumed}"
            for name in KERNELS
        ]
        measured = {name: f"{self.fractions.get(name, 0):.3g} ({self.origin})" for name in _OTHERS}
        link = measured["link"] if "link" in self.fractions else f"{LINK}: assumed"
        host = measured["host"] if "host" in self.fractions else "1: as in foldcp/planner/rates.py"
        return [*lines, f"link, of the stated bytes per second: {link}", f"host: {host}"]


ASSUMED = KernelRates()


def read_rates(path: Path, chip: Chip) -> KernelRates:
    """Read what kernels reach from a table of measurements.

    Args:
        path: of the table, see the top of this file.
        chip: that was measured, whose stated rates `seconds` are turned to fractions of.

    Raises:
        ValueError: the table cannot be read, or a row of it is wrong.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read rates from {path}: {error}; check the path") from None
    if not rows:
        raise ValueError(f"{path} has no rates: give a table with a column `kernel`")
    found: dict[str, list[float]] = {}
    for line, row in enumerate(rows, 2):
        name = row.get("kernel") or ""
        if name not in (*KERNELS, *_OTHERS):
            known = ", ".join((*KERNELS, *_OTHERS))
            raise ValueError(f"{path}, line {line}: kernel {name!r} is not one of {known}")
        found.setdefault(name, []).append(_fraction(row, name, chip, f"{path}, line {line}"))
    means = {name: exp(fsum(map(log, of)) / len(of)) for name, of in found.items()}
    return KernelRates(means, str(path))


def _fraction(row: Mapping[str, str | None], name: str, chip: Chip, where: str) -> float:
    try:
        if row.get("fraction"):
            value = float(row["fraction"] or "")
        elif name in _OTHERS:
            raise ValueError
        else:
            flops, moved, exps = (float(row.get(x) or 0) for x in ("flops", "bytes", "exps"))
            whole = replace(
                chip,
                tflops=chip.tflops / TENSOR,
                float32_tflops=chip.float32_tflops / TENSOR,
                tbs=chip.tbs / MEMORY,
                gexps=chip.gexps / EXP,
            )
            least = whole.seconds(int(row.get("itemsize") or 2), flops, moved, exps)
            value = least / float(row.get("seconds") or "")
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not (isfinite(value) and value > 0):
        raise ValueError(
            f"{where}: give a positive `fraction` of the stated rates"
            + ("" if name in _OTHERS else ", or `seconds` with `flops`, `bytes` and `exps`")
        )
    return value


def shared(chip: Chip, links: Links, ranks: int, cores: int) -> tuple[Chip, Links]:
    """Return a core and its links as a rank finds them that shares the cores with others.

    Args:
        chip: one core.
        links: between ranks that have a core each.
        ranks: of the machine.
        cores: of the machine.
    """
    part = min(1.0, cores / ranks)
    slower = replace(
        chip,
        tflops=chip.tflops * part,
        float32_tflops=chip.float32_tflops * part,
        tbs=chip.tbs * part,
        gexps=chip.gexps * part,
        host=chip.host / part,
    )
    near, far = (
        replace(link, gbs=link.gbs * part, latency=link.latency / part)
        for link in (links.near, links.far)
    )
    return slower, replace(links, near=near, far=far)
