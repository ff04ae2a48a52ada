"""Say which part of a prediction computes in which format: one table, and presets of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

# Formats of the products of each group. Everything else (softmax, LayerNorm statistics, sums,
# coordinates, noise, alignment) is float32 in every format.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "pair": ("fp32", "bf16"),
    "contraction": ("fp32", "bf16", "fp8"),
    "msa": ("fp32", "bf16"),
    "single": ("fp32", "tf32", "bf16"),
    "tokens": ("fp32", "tf32", "bf16"),
    "atoms": ("fp32", "tf32", "bf16"),
}


@dataclass(frozen=True)
class Precision:
    """Format of the products of each group of operations.

    Args:
        pair: pair track: triangle ops, transitions, heads, pair conditioning.
        contraction: planes of triangle multiplication, which travel and are contracted.
        msa: MSA track.
        single: single track of the pairformer.
        tokens: token transformer of the sampler.
        atoms: atom transformers of the sampler.

    Raises:
        ValueError: a combination that no code runs; names those that do.
    """

    pair: str = "fp32"
    contraction: str = "fp32"
    msa: str = "fp32"
    single: str = "fp32"
    tokens: str = "fp32"
    atoms: str = "fp32"

    def __post_init__(self) -> None:
        for group, formats in FORMATS.items():
            if getattr(self, group) not in formats:
                raise ValueError(
                    f"{group} runs in {_either(formats)}, not in {getattr(self, group)}"
                )
        if self.msa != self.pair:
            raise ValueError(
                f"msa runs in the format of pair, {self.pair}, not in {self.msa}: set both"
            )
        if self.contraction not in (self.pair, "fp8"):
            raise ValueError(
                f"contraction runs in the format of pair, {self.pair}, or in fp8, not in "
                f"{self.contraction}"
            )

    @property
    def needs_gpu(self) -> tuple[str, ...]:
        """Return the groups in TF32, which CPUs do not have."""
        return tuple(x.name for x in fields(self) if getattr(self, x.name) == "tf32")

    def described(self) -> str:
        """Describe the table in a few words: the name of a preset, and what differs from it."""
        name, differing = min(
            ((name, self._differing(preset)) for name, preset in PRESETS.items()),
            key=lambda found: len(found[1]),
        )
        return ",".join((name, *(f"{group}={form}" for group, form in differing.items())))

    def table(self) -> dict[str, str]:
        """Return the format of each group by name."""
        return {x.name: getattr(self, x.name) for x in fields(self)}

    def _differing(self, other: Precision) -> dict[str, str]:
        theirs = other.table()
        return {group: form for group, form in self.table().items() if form != theirs[group]}


_BF16 = Precision("bf16", "bf16", "bf16")
_TF32 = replace(_BF16, single="tf32", tokens="tf32", atoms="tf32")
PRESETS: Mapping[str, Precision] = {
    "fp32": Precision(),
    "bf16": _BF16,
    "tf32": _TF32,
    "fp8": replace(_TF32, contraction="fp8"),
}


def read(text: str) -> Precision:
    """Read a preset and what differs from it, for example "tf32,tokens=bf16".

    Args:
        text: names a preset of `PRESETS`, then groups with their format, separated by commas.

    Raises:
        ValueError: there is no such preset, group or format, or no code runs the combination.
    """
    name, *changes = (part.strip().lower() for part in text.split(","))
    if name not in PRESETS:
        raise ValueError(f"there is no precision {name!r}: begin with {_either(tuple(PRESETS))}")
    table = PRESETS[name].table()
    for change in changes:
        group, equals, form = (x.strip() for x in change.partition("="))
        if not equals or group not in FORMATS:
            raise ValueError(
                f"{change!r} is not GROUP=FORMAT, as in tokens=bf16; groups are "
                f"{', '.join(FORMATS)}"
            )
        table[group] = form
    # What follows pair need not be said: pair=fp32 takes the MSA and the planes along.
    said = {change.partition("=")[0].strip() for change in changes}
    if "pair" in said:
        for group in ("msa", "contraction"):
            if group not in said and table[group] != "fp8":
                table[group] = table["pair"]
    return Precision(**table)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)
