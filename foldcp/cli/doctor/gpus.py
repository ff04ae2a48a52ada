"""Ask about GPUs, their driver, and the links between them.

What `nvidia-smi` and torch say comes as arguments, so that tests can give that of another machine.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

from foldcp.cli.doctor.finding import Finding

OLDEST_GPU = (8, 0)  # of Triton's kernels
_NOT_ON_PATH = "nvidia-smi is not on PATH"


def ask(*arguments: str) -> tuple[bool, str]:
    """Run `nvidia-smi`.

    Args:
        arguments: its own.

    Returns:
        Whether it answered, and its answer or why there is none.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        return False, _NOT_ON_PATH
    except (OSError, subprocess.SubprocessError) as error:
        return False, f"nvidia-smi does not run ({error})"
    said = done.stdout if done.returncode == 0 else done.stdout + done.stderr
    return done.returncode == 0, said.strip()


def described(index: int, name: str, memory: int, capability: tuple[int, int]) -> Finding:
    """Describe a GPU that torch sees.

    Args:
        index: of the GPU.
        name: of its kind.
        memory: bytes.
        capability: such as (9, 0).
    """
    major, minor = capability
    text = f"{name}, {memory / 1e9:.0f} GB, sm_{major}{minor}"
    if capability < OLDEST_GPU:
        remedy = "Triton's kernels need sm_80: the ops run in torch here, slower"
        return Finding(f"GPU {index}", text, remedy)
    return Finding(f"GPU {index}", text)


def unseen(listed: tuple[bool, str], built_for: str | None, environ: Mapping[str, str]) -> Finding:
    """Say why torch sees no GPU.

    Args:
        listed: answer of `nvidia-smi -L`.
        built_for: CUDA that torch was built for, None: it is for CPUs.
        environ: usually `os.environ`.
    """
    answered, said = listed
    found = [line for line in said.splitlines() if line.startswith("GPU ")] if answered else []
    cpu = "pass --accelerator cpu to boltz predict"
    if not found:
        failed = not answered and said != _NOT_ON_PATH
        why = f" ({' '.join(said.split())[:200]})" if failed else ""
        remedy = f"repair the driver, or {cpu}" if failed else ""
        return Finding("GPU", f"none visible{why}: {cpu}", remedy)
    there = f"none visible to torch, but nvidia-smi lists {len(found)}"
    if built_for is None:
        return Finding("GPU", there, "this torch is built for CPUs: install one for CUDA")
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        remedy = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or name GPUs that there are"
        return Finding("GPU", there, remedy)
    remedy = f"torch is for CUDA {built_for}: update the driver, or install torch for an older CUDA"
    return Finding("GPU", there, remedy)


def driver(answer: tuple[bool, str], runs: int, built_for: str | None) -> Finding:
    """Compare the driver with what torch was built for.

    Args:
        answer: of `nvidia-smi --query-gpu=driver_version --format=csv,noheader`.
        runs: newest CUDA that the driver runs, 12080 for 12.8, 0: not known.
        built_for: CUDA that torch was built for, None: it is for CPUs.
    """
    answered, said = answer
    version = said.splitlines()[0].strip() if answered and said else "of unknown version"
    text = f"{version}, runs CUDA {runs // 1000}.{runs % 1000 // 10}" if runs else version
    if runs and built_for and runs // 1000 < int(built_for.split(".")[0]):
        remedy = (
            f"torch is for CUDA {built_for}: update the driver, or install torch for an older CUDA"
        )
        return Finding("driver", text, remedy)
    return Finding("driver", text)


def links(answer: tuple[bool, str], gpus: int) -> Finding:
    """Say what joins the GPUs.

    Args:
        answer: of `nvidia-smi topo -m`.
        gpus: how many there are.
    """
    answered, said = answer
    found = dict(_pairs(said, gpus)) if answered else {}
    if len(found) < gpus * (gpus - 1) // 2:
        why = "" if answered else f" ({' '.join(said.split())[:100]})"
        return Finding("links", f"not known{why}")
    by_kind: dict[str, list[str]] = {}
    for (a, b), kind in found.items():
        by_kind.setdefault(kind, []).append(f"{a}-{b}")
    texts = []
    for kind, pairs in sorted(by_kind.items(), key=lambda item: -len(item[1])):
        count = kind.removeprefix("NV")
        name = f"NVLink ({count} links)" if kind.startswith("NV") else f"PCIe ({kind})"
        where = "all pairs" if len(by_kind) == 1 else f"{len(pairs)} pairs ({', '.join(pairs[:4])})"
        texts.append(f"{name} between {where}")
    slow = any(kind in ("SYS", "NODE") for kind in by_kind)
    remedy = "FOLDCP_ROUTE=ring may be faster where GPUs are on different sockets" if slow else ""
    return Finding("links", "; ".join(texts), remedy)


def _pairs(table: str, gpus: int) -> Iterator[tuple[tuple[int, int], str]]:
    """Read the link of each pair from the table of `nvidia-smi topo -m`."""
    for line in table.splitlines():
        cells = line.split()
        row = re.fullmatch(r"GPU(\d+)", cells[0]) if cells else None
        if row is None or len(cells) <= gpus or cells[1].startswith("GPU"):
            continue
        for column in range(int(row[1]) + 1, gpus):
            yield (int(row[1]), column), cells[1 + column]


def peers(gpus: int, reaches: Callable[[int, int], bool]) -> Finding:
    """Say which GPUs can read each other's memory.

    Args:
        gpus: how many there are.
        reaches: whether the first one reads the memory of the second one.
    """
    apart = [f"{a}-{b}" for a, b in combinations(range(gpus), 2)
             if not (reaches(a, b) and reaches(b, a))]  # fmt: skip
    if not apart:
        return Finding("peer access", "between all pairs")
    listed = ", ".join(apart[:6]) + (", ..." if len(apart) > 6 else "")
    remedy = (
        "NCCL then copies through host memory: in a virtual machine or with an IOMMU, turn ACS and "
        "the IOMMU off; in a container, give it all GPUs"
    )
    return Finding("peer access", f"not between {listed}", remedy)
