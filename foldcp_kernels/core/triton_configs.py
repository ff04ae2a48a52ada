"""Block sizes, warps and stages of every kernel on every chip, in one table.

`untuned` marks what was chosen by registers and shared memory alone (bench/results/aot.csv); a
measured entry names the file with its times. Of several candidates the first is the one in use:
the one that bench/occupancy.py models as the fastest, until one is measured. `python -m bench.tune`
measures candidates on the GPU at hand and writes a cache that takes precedence on that GPU; nothing
is tuned on its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

UNTUNED = "untuned"
MODELLED = "bench/occupancy.py"  # chosen by its model among the candidates
UNMEASURED = (UNTUNED, MODELLED)


@dataclass(frozen=True)
class Config:
    """Launch configuration of one kernel.

    Args:
        blocks: its block sizes by constant name.
        warps: num_warps of Triton.
        stages: num_stages of Triton.
        source: "untuned", or the file with the measurement or the model.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    source: str = UNTUNED

    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


def _c(warps: int, stages: int, source: str = UNTUNED, **blocks: int) -> Config:
    return Config(blocks, warps, stages, source)


def _core(warps: int, stages: int, bi: int, bk: int) -> Config:
    return _c(warps, stages, MODELLED, ROWS=2, GROUP=12, BI=bi, BK=bk, LAZY=1)


# (kernel, bytes of an operand of its dots) -> chip -> configuration, or several of which the first
# is used. "any" is for chips not named.
TABLE: dict[tuple[str, int], dict[str, Config | tuple[Config, ...]]] = {
    ("norm_linear", 2): {
        "any": _c(8, 2, BP=128, BO=64),
        "sm_100": _c(4, 2, BP=64, BO=64),
    },
    ("norm_linear", 4): {"any": _c(8, 1, BP=64, BO=32)},
    ("norm_linear_gated", 2): {
        "any": _c(8, 2, BP=128, BO=64),
        "sm_89": _c(4, 2, BP=64, BO=64),
        "sm_100": _c(4, 2, BP=64, BO=64),
    },
    ("norm_linear_gated", 4): {"any": _c(8, 1, BP=64, BO=32)},
    # Attention core. ROWS batch rows share a bias tile; GROUP such sets run side by side (modelled
    # in bench.l2); LAZY rescales only when needed.
    # Chosen by bench.occupancy: on sm_90 and sm_100 blocks of 64 queries would read keys and values
    # from L2 twice as often, which costs more than a second program hides; sm_120 gains by it.
    ("attention_32", 2): {
        "any": _core(4, 2, 64, 32),
        "sm_80": (_core(4, 3, 64, 32), _core(4, 2, 64, 32)),
        "sm_90": (_core(8, 2, 128, 64), _core(4, 2, 64, 64)),
        "sm_100": (_core(8, 2, 128, 32), _core(4, 2, 64, 32)),
        "sm_120": (_core(4, 2, 64, 32), _core(8, 2, 128, 32)),
    },
    ("attention_32_masked", 2): {
        "any": _c(4, 2, ROWS=2, GROUP=12, BI=64, BK=32, LAZY=1),
        "sm_89": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=1),
        "sm_100": _c(4, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0),
    },
    ("attention_32_single", 2): {
        "any": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=1),
        "sm_90": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=64, LAZY=1),
        "sm_100": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=64, LAZY=1),
    },
    ("attention_64", 2): {
        "any": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=1),
        "sm_90": _c(4, 2, ROWS=2, GROUP=12, BI=64, BK=32, LAZY=1),
        "sm_100": _c(4, 2, ROWS=2, GROUP=12, BI=64, BK=32, LAZY=1),
    },
    ("attention_64_masked", 2): {
        "any": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=1),
        "sm_100": _c(4, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0),
    },
    ("attention_64_single", 2): {"any": _c(4, 2, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=1)},
    # 32 queries of a window to 128 keys.
    ("attention_32_window", 2): {"any": _c(4, 1, ROWS=2, GROUP=12, BI=32, BK=32, LAZY=0)},
    ("attention_64_window", 2): {"any": _c(2, 1, ROWS=1, GROUP=12, BI=32, BK=32, LAZY=0)},
    ("attention_32", 4): {"any": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0)},
    ("attention_32_masked", 4): {"any": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0)},
    ("attention_32_single", 4): {"any": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0)},
    ("attention_64", 4): {
        "any": _c(4, 1, ROWS=1, GROUP=12, BI=32, BK=32, LAZY=0),
        "sm_90": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0),
        "sm_100": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0),
    },
    ("attention_64_masked", 4): {"any": _c(4, 1, ROWS=1, GROUP=12, BI=32, BK=32, LAZY=0)},
    ("attention_64_single", 4): {
        "any": _c(4, 1, ROWS=1, GROUP=12, BI=32, BK=32, LAZY=0),
        "sm_90": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0),
        "sm_100": _c(8, 1, ROWS=1, GROUP=12, BI=64, BK=32, LAZY=0),
    },
    ("attention_32_window", 4): {"any": _c(4, 1, ROWS=1, GROUP=12, BI=32, BK=32, LAZY=0)},
    ("attention_64_window", 4): {"any": _c(4, 1, ROWS=1, GROUP=12, BI=32, BK=32, LAZY=0)},
    ("attention_dq_32", 2): {
        "any": _c(4, 2, GROUP=32, BI=64, BK=32),
        "sm_89": _c(4, 1, GROUP=32, BI=64, BK=32),
    },
    ("attention_dq_64", 2): {
        "any": _c(4, 1, GROUP=32, BI=64, BK=64),
        "sm_80": _c(4, 2, GROUP=32, BI=64, BK=32),
    },
    ("attention_dkv_32", 2): {"any": _c(4, 1, GROUP=32, BI=64, BK=64)},
    ("attention_dkv_64", 2): {
        "any": _c(4, 1, GROUP=32, BI=64, BK=64),
        "sm_80": _c(4, 2, GROUP=32, BI=64, BK=32),
        "sm_89": _c(4, 2, GROUP=32, BI=64, BK=32),
    },
    ("attention_dbias_32", 2): {
        "any": _c(4, 2, GROUP=16, BI=64, BK=32),
        "sm_100": _c(8, 2, GROUP=16, BI=64, BK=32),
    },
    ("attention_dbias_64", 2): {"any": _c(4, 2, GROUP=16, BI=64, BK=32)},
    ("attention_dq_32", 4): {"any": _c(8, 1, GROUP=32, BI=32, BK=32)},
    ("attention_dq_64", 4): {"any": _c(8, 1, GROUP=32, BI=32, BK=32)},
    ("attention_dkv_32", 4): {"any": _c(4, 1, GROUP=32, BI=32, BK=16)},
    ("attention_dkv_64", 4): {"any": _c(4, 1, GROUP=32, BI=32, BK=16)},
    ("attention_dbias_32", 4): {"any": _c(4, 1, GROUP=16, BI=16, BK=16)},
    ("attention_dbias_64", 4): {"any": _c(4, 1, GROUP=16, BI=16, BK=16)},
    # Chosen by bench.occupancy: memory bounds both epilogues, so that two or three programs of four
    # warps beat one of eight, whose reads and writes nothing hides.
    ("attention_output", 2): {
        "any": _c(4, 2, BP=64, BH=64),
        "sm_80": (_c(4, 2, MODELLED, BP=64, BH=32), _c(8, 2, MODELLED, BP=128, BH=32)),
        "sm_89": (_c(4, 2, MODELLED, BP=64, BH=32), _c(8, 2, MODELLED, BP=128, BH=32)),
        "sm_90": (_c(4, 2, MODELLED, BP=64, BH=32), _c(8, 2, MODELLED, BP=128, BH=32)),
        "sm_100": (_c(4, 2, MODELLED, BP=64, BH=64), _c(8, 2, MODELLED, BP=128, BH=64)),
        "sm_120": (_c(4, 2, MODELLED, BP=64, BH=32), _c(4, 2, MODELLED, BP=64, BH=64)),
    },
    ("attention_output", 4): {"any": _c(8, 1, BP=32, BH=32), "sm_89": _c(4, 1, BP=16, BH=32)},
    ("multiplication_output", 2): {
        "any": (_c(4, 2, MODELLED, BP=64, BO=64), _c(4, 2, MODELLED, BP=64, BO=32)),
        "sm_90": (_c(4, 2, MODELLED, BP=64, BO=32), _c(8, 2, MODELLED, BP=128, BO=64)),
        "sm_100": (_c(4, 2, MODELLED, BP=64, BO=32), _c(8, 2, MODELLED, BP=128, BO=64)),
    },
    ("multiplication_output", 4): {"any": _c(4, 1, BP=16, BO=32)},
    # Chosen by bench.occupancy: weights come from L2 once per block, so that large blocks win where
    # only one program fits either way or L2 is the bound (sm_90, sm_100).
    ("transition", 2): {
        "any": (_c(4, 2, MODELLED, BP=64, BH=64), _c(4, 2, MODELLED, BP=64, BH=32)),
        "sm_89": (_c(4, 2, MODELLED, BP=64, BH=32), _c(4, 2, MODELLED, BP=64, BH=64)),
        "sm_90": (_c(8, 2, MODELLED, BP=128, BH=64), _c(4, 2, MODELLED, BP=64, BH=32)),
        "sm_100": (_c(8, 2, MODELLED, BP=128, BH=64), _c(4, 2, MODELLED, BP=64, BH=32)),
        "sm_120": _c(4, 2, BP=64, BH=32),  # BH=64 spills
    },
    ("transition", 4): {"any": _c(4, 1, BP=16, BH=32)},
    # "bytes": rows of the planes do not begin at multiples of 16 bytes.
    ("fp8_contraction", 1): {
        "any": _c(8, 3, BM=128, BN=128, BK=128, TAIL=32),
        "sm_90": _c(8, 4, BM=128, BN=128, BK=128, TAIL=32),
        "sm_100": _c(8, 4, BM=128, BN=128, BK=128, TAIL=32),
    },
    ("fp8_contraction_bytes", 1): {"any": _c(4, 2, BM=64, BN=64, BK=32, TAIL=32)},
    # BM, BN, BK: sizes of the outer product's dots.
    ("outer_product_mean", 2): {"any": _c(8, 2, BM=64, BN=128, BK=128, BS=32)},
    ("outer_product_mean", 4): {"any": _c(8, 1, BM=32, BN=64, BK=64, BS=32)},
    ("expected_values", 2): {"any": _c(4, 2, BP=64, BK=32)},
    ("expected_values", 4): {"any": _c(8, 1, BP=64, BK=32), "sm_120": _c(8, 1, BP=32, BK=32)},
    ("expected_values_wide", 2): {
        "any": _c(8, 2, BP=64, BK=32),
        "sm_80": _c(4, 2, BP=32, BK=32),
        "sm_89": _c(4, 2, BP=32, BK=32),
    },
    ("expected_values_wide", 4): {"any": _c(8, 1, BP=32, BK=32)},
    # Without matrix products, so one entry for all dtypes; BE is the elements of a block.
    ("relative_position", 2): {"any": _c(4, 1, BE=4096)},
    ("adaptive_norm", 2): {"any": _c(4, 1, BE=4096)},
}

_FAMILY = {80: "sm_80", 86: "sm_89", 87: "sm_80", 89: "sm_89", 90: "sm_90", 100: "sm_100"}
_FAMILY |= {103: "sm_100", 110: "sm_100", 120: "sm_120", 121: "sm_120"}


def family(capability: int) -> str:
    """Return the table's column for a compute capability (90 for sm_90); "any" when unknown."""
    return _FAMILY.get(capability, "any")


def candidates(kernel: str, operand_bytes: int, chip: str) -> tuple[Config, ...]:
    """Return the configurations of a kernel on a chip of `family`, the one in use first.

    Args:
        kernel: its name in `TABLE`.
        operand_bytes: 1 for FP8, 2 for bf16 and fp16, 4 for float32.
        chip: of `family`.
    """
    chips = TABLE[kernel, operand_bytes]
    found = chips.get(chip, chips["any"])
    return found if isinstance(found, tuple) else (found,)


def cache_file() -> Path:
    """Return the file of this machine's measurements by `bench.tune`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "foldcp" / "tuned.json"


class Tuned:
    """Configurations that this machine takes before those of the table: measured, or on trial.

    They belong to the GPUs of a process, as compiled kernels do.
    """

    @cached_property
    def found(self) -> dict[str, dict]:
        """Configurations by "kernel/bytes/chip": at first those of the cache of `bench.tune`."""
        path = cache_file()
        return json.loads(path.read_text()) if path.is_file() else {}

    def forget(self) -> None:
        """Read the cache again when a configuration is asked for."""
        vars(self).pop("found", None)


TUNED = Tuned()


def pick(kernel: str, operand_bytes: int, capability: int) -> Config:
    """Return the configuration of a kernel.

    Args:
        kernel: its name in `TABLE`.
        operand_bytes: 1 for FP8, 2 for bf16 and fp16, 4 for float32.
        capability: compute capability as a number; 0 for the interpreter.
    """
    chip = family(capability)
    # The interpreter has no registers to spare: the larger blocks are the faster ones.
    shipped = candidates(kernel, operand_bytes if capability else min(2, operand_bytes), chip)[0]
    tuned = TUNED.found.get(f"{kernel}/{operand_bytes}/{chip}")
    if tuned is None:
        return shipped
    # A cache of an earlier state may lack a size that the kernel has since.
    return Config(**(tuned | {"blocks": shipped.blocks | tuned["blocks"]}))


def override(kernel: str, operand_bytes: int, capability: int, config: Config | None) -> None:
    """Use a configuration in this process (None: the table's again); for tuning.

    Args:
        kernel: its name in `TABLE`.
        operand_bytes: 1 for FP8, 2 for bf16 and fp16, 4 for float32.
        capability: 90 for sm_90.
        config: the configuration, None for the table's.
    """
    key = f"{kernel}/{operand_bytes}/{family(capability)}"
    if config is None:
        TUNED.found.pop(key, None)
    else:
        TUNED.found[key] = vars(config)
