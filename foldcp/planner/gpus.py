"""List the GPUs that a plan can be made for, and read what `--gpus` asks for.

Figures as NVIDIA states them in what each entry names; `rates.py` says what is expected of them.
Only those of the RTX 4090 and the L40S were compared with public copies of it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from foldcp.errors import UserError
from foldcp.planner.rates import (
    B200,
    H100,
    H200,
    NDR,
    NVLINK4,
    NVLINK5,
    PCIE4,
    PCIE5,
    Chip,
    Link,
    Links,
)

MOST = 4096  # GPUs of a cluster
NODE = 8  # GPUs of a node, where nothing is said
NVLINK3 = Link("NVLink 3", 300, 5e-6)
_GB = 1_000_000_000
_FORM = "COUNTxNAME[-GB], for example 8xh100-80, or NODESxCOUNTxNAME"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        name: as `--gpus` has it.
        gigabytes: memory by its name, in 10^9 bytes, which is a little less than it reports.
        chip: its rates.
        near: what links the GPUs of a node.
    """

    name: str
    gigabytes: int
    chip: Chip
    near: Link

    @property
    def label(self) -> str:
        """Name and memory, as `--gpus` has them."""
        return f"{self.name}-{self.gigabytes}"


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Args:
        gpu: the kind.
        count: of them.
        node: GPUs of a node.
        memory: bytes of each.
    """

    gpu: Gpu
    count: int
    node: int
    memory: int

    @property
    def links(self) -> Links:
        """The links between the GPUs."""
        return Links(self.gpu.near, NDR, self.node)

    def __str__(self) -> str:
        return f"{self.count}x{self.gpu.label}"


def _chip(
    name: str, sms: int, clock: float, tflops: float, fp32: float, tbs: float, source: str
) -> Chip:
    # 16 exponentials per SM and clock, as in rates.py; bfloat16 dense, summed in float32.
    return Chip(name, tflops, fp32, 16 * sms * clock, tbs, f"NVIDIA {source}")


_A100 = _chip("A100", 108, 1.41, 312, 19.5, 2.039, "A100 datasheet, 80 GB SXM")
GPUS = (
    Gpu("rtx3090", 24, _chip("RTX 3090", 82, 1.695, 71, 35.6, 0.936, "GA102 white paper"), PCIE4),
    Gpu("rtx4090", 24, _chip("RTX 4090", 128, 2.52, 165.2, 82.6, 1.008, "Ada white paper"), PCIE4),
    Gpu("rtx5090", 32, _chip("RTX 5090", 170, 2.407, 209.5, 104.8, 1.792,
                             "RTX Blackwell white paper"), PCIE5),
    Gpu("a5000", 24, _chip("RTX A5000", 64, 1.695, 111, 27.8, 0.768, "RTX A5000 datasheet"), PCIE4),
    Gpu("a6000", 48, _chip("RTX A6000", 84, 1.8, 154.8, 38.7, 0.768, "RTX A6000 datasheet"), PCIE4),
    Gpu("l4", 24, _chip("L4", 58, 2.04, 121, 30.3, 0.3, "L4 datasheet"), PCIE4),
    Gpu("l40s", 48, _chip("L40S", 142, 2.52, 362, 91.6, 0.864, "L40S datasheet"), PCIE4),
    Gpu("a100", 40, replace(_A100, tbs=1.555, source="NVIDIA A100 datasheet, 40 GB SXM"), NVLINK3),
    Gpu("a100", 80, _A100, NVLINK3),
    Gpu("h100", 80, H100, NVLINK4),
    Gpu("h200", 141, H200, NVLINK4),
    Gpu("b200", 180, B200, NVLINK5),
    Gpu("b300", 288, _chip("B300", 160, 1.92, 2250, 77, 8.0, "DGX B300 datasheet, per GPU"),
        NVLINK5),
)  # fmt: skip


def _plain(name: str) -> str:
    text = re.sub(r"[^a-z0-9]", "", name.lower())
    for brand in ("nvidia", "geforce", "tesla", "rtx"):
        text = text.replace(brand, "")
    return text


def parse(text: str) -> Cluster:
    """Read what `--gpus` asks for.

    Args:
        text: COUNTxNAME, COUNTxNAME-GB, NODESxCOUNTxNAME-GB, or a name for one GPU.

    Raises:
        UserError: it names no GPU of the table, or no possible number of them.
    """
    form = r"(?:(?:(-?\d+)x)?(-?\d+)x)?([a-z][a-z0-9 _]*?)(?:[- ]?(\d+) ?gb|-(\d+))?"
    match = re.fullmatch(form, text.strip().lower())
    if match is None:
        raise UserError(f"--gpus must be {_FORM}, got {text!r}")
    nodes, each = int(match[1] or 1), int(match[2] or 1)
    if nodes < 1 or each < 1 or nodes * each > MOST:
        raise UserError(f"--gpus {text}: give 1 to {MOST} GPUs, as {_FORM}")
    kinds = [gpu for gpu in GPUS if _plain(gpu.name) == _plain(match[3])]
    listed = ", ".join(gpu.label for gpu in GPUS)
    if not kinds:
        names = {_plain(gpu.name): gpu.name for gpu in GPUS}
        near = difflib.get_close_matches(_plain(match[3]), names, 1, 0.3)
        meant = f"did you mean {names[near[0]]}? Else " if near else ""
        raise UserError(f"--gpus {text}: no GPU {match[3]!r} is known: {meant}use one of {listed}")
    size = match[4] or match[5]
    fitting = [gpu for gpu in kinds if size is None or gpu.gigabytes == int(size)]
    if not fitting:
        sizes = " or ".join(gpu.label for gpu in kinds)
        raise UserError(f"--gpus {text}: there is no such memory, use {sizes} ({listed})")
    gpu = fitting[0]
    node = each if match[1] else min(each, NODE)
    return Cluster(gpu, nodes * each, node, gpu.gigabytes * _GB)


def named(name: str, count: int, memory: int) -> Cluster | None:
    """Return the GPUs of a machine as a cluster, None where the table does not have their kind.

    Args:
        name: as the driver gives it, for example "NVIDIA H100 80GB HBM3".
        count: of them.
        memory: bytes of each.
    """
    words = {_plain(word) for word in re.split(r"[\s-]+", name)} | {_plain(name)}
    kinds = [gpu for gpu in GPUS if _plain(gpu.name) in words]
    if not kinds:
        return None
    nearest = min(kinds, key=lambda gpu: abs(gpu.gigabytes * _GB - memory))
    return Cluster(nearest, count, count, memory)
