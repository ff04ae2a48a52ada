"""Decide what setup.py builds: facts of a toolchain in, parts, options and a sentence out.

All functions here are pure; setup.py asks the machine. The extension calls torch through its stable
interface, has a CUDA runtime of its own (cudart_static) and shares driver handles (streams, the
primary context) with torch. NVIDIA allows several static runtimes in one process as long as the
driver is at least as new as each of them. So nvcc may be of an older CUDA than torch, whose driver
runs both; of a newer major only where the driver on this machine is known to run that too.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

CHIPS = "8.0+PTX;9.0a;10.0a;12.0+PTX"  # the PTX of sm_80 runs on what is not listed
OLDEST_TORCH = (2, 11)
STABLE = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)  # torch's interface
HOST = ("module.c", "ops.cpp", "replay.cpp", "wire/view.cpp", "transports/shared_memory.cpp")
HOST += tuple(f"transports/nccl/{name}.cpp" for name in ("nccl", "nccl_abi", "nccl_aborts"))
CUDA = ("wire/pack.cu", "transports/cuda_backend.cpp", "transports/cuda_carriers.cpp")
AGAIN = "run `pip install --force-reinstall --no-deps .` in the clone"
OLDEST_NVCC = (12, 0)  # the first that compiles C++20
# Release of nvcc that a chip came with, and the one that dropped it.
_SINCE = {80: (11, 0), 86: (11, 1), 87: (11, 4), 88: (13, 0), 89: (11, 8), 90: (11, 8)}
_SINCE |= {100: (12, 8), 101: (12, 8), 103: (12, 9), 110: (13, 0), 120: (12, 8), 121: (12, 9)}
_UNTIL = {chip: (13, 0) for chip in (50, 52, 53, 60, 61, 62, 70, 72, 101)}
_ERROR = re.compile(
    r"\berror\b.*:|^error\b|nvcc fatal|: not found$|cannot find -l|undefined reference", re.I
)


@dataclass(frozen=True)
class Facts:
    """The toolchain of a machine.

    Args:
        mode: FOLDCP_BUILD_CUDA.
        chips: TORCH_CUDA_ARCH_LIST.
        torch: its release, "" without torch.
        torch_fault: why it cannot be used.
        torch_cuda: CUDA that it was built with, "" without.
        rocm: built for AMD.
        compiler_fault: why C++20 with Python.h does not compile, "" where it does.
        nvcc: its release, "" without.
        nvcc_fault: why it cannot be used.
        known: chips that nvcc lists (80), empty where it does not list them.
        driver: major version of CUDA that the driver on this machine runs, 0 without a driver.
    """

    mode: str = ""
    chips: str = ""
    torch: str = ""
    torch_fault: str = ""
    torch_cuda: str = ""
    rocm: bool = False
    compiler_fault: str = ""
    nvcc: str = ""
    nvcc_fault: str = ""
    known: tuple[int, ...] = ()
    driver: int = 0


@dataclass(frozen=True)
class Plan:
    """Parts of the extension to build.

    Args:
        parts: "cuda" (with the CPU part), "cpu" or "none".
        cuda: release of nvcc, "" without.
        chips: that it is built for.
        why: what is left out, why, and the remedy; "" for nothing.
    """

    parts: str
    cuda: str = ""
    chips: str = ""
    why: str = ""

    def line(self) -> str:
        """Describe the build in one line for the user, which `foldcp doctor` repeats."""
        if self.parts == "cuda":
            rest = f"; left out: {self.why}" if self.why else ""
            return f"for CPU and CUDA {self.cuda} ({self.chips}){rest}"
        return f"for CPU; CUDA left out: {self.why}" if self.parts == "cpu" else f"none: {self.why}"

    def info(self, torch: str) -> dict[str, Any]:
        """Return the content of foldcp_kernels/_build_info.py."""
        built = self.parts != "none"
        return {**asdict(self), "built": built, "torch": torch, "line": self.line()}


class Refused(Exception):
    """The build that was asked for is not possible; the text names the remedy."""


def decide(facts: Facts) -> Plan:
    """Choose what to build.

    Args:
        facts: of the toolchain.

    Returns:
        As much as works.

    Raises:
        Refused: FOLDCP_BUILD_CUDA or TORCH_CUDA_ARCH_LIST asks for what does not work.
    """
    if facts.mode not in ("", "0", "1"):
        raise Refused(f"FOLDCP_BUILD_CUDA must be 0, 1 or unset, got {facts.mode!r}")
    if nothing := _no_extension(facts):
        plan = Plan("none", why=nothing)
    elif no_cuda := _no_cuda(facts):
        plan = Plan("cpu", why=no_cuda)
    else:
        chips, why = choose_chips(facts)
        plan = Plan("cuda", facts.nvcc, chips, why) if chips else Plan("cpu", why=why)
    if facts.mode == "1" and plan.parts != "cuda":
        raise Refused(f"FOLDCP_BUILD_CUDA=1, but {plan.why}")
    return plan


def fall_back(plan: Plan, error: str) -> Plan:
    """Return the next smaller plan, after one that did not compile.

    Args:
        plan: that failed.
        error: the compiler's line.
    """
    if plan.parts == "cuda":
        return Plan("cpu", why=f"it did not compile: {error}")
    return Plan("none", why=f"the C++ part did not compile: {error}")


def first_error(log: str, otherwise: str) -> str:
    """Return the first whole line of a build's output that states an error.

    Args:
        log: the output.
        otherwise: what to say when no line does.
    """
    plain = re.sub(r"\x1b\[[0-9;]*[mK]", "", log)
    found = (line.strip() for line in plain.splitlines() if _ERROR.search(line.strip()))
    return next(found, " ".join(otherwise.split()) or "no reason was given")


def _no_extension(facts: Facts) -> str:
    """Return the reason why nothing can be compiled, "" where something can."""
    if facts.torch_fault:
        return facts.torch_fault
    if _numbers(facts.torch) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {facts.torch} is older than {oldest}: upgrade torch, then {AGAIN}"
    return facts.compiler_fault


def _no_cuda(facts: Facts) -> str:
    """Return the reason why the CUDA part cannot be compiled, "" where it can."""
    if facts.mode == "0":
        return "FOLDCP_BUILD_CUDA=0"
    if facts.rocm:
        return "torch is built for ROCm: install a build of torch for CUDA"
    if facts.nvcc_fault:
        return facts.nvcc_fault
    if _numbers(facts.nvcc) < OLDEST_NVCC:
        return f"nvcc {facts.nvcc} is older than 12.0: set CUDA_HOME to a newer toolkit"
    major, torchs = _numbers(facts.nvcc)[0], _numbers(facts.torch_cuda or "0")[0]
    if facts.torch_cuda and major > torchs and facts.driver < major:
        driver = f"the driver here runs CUDA {facts.driver}" if facts.driver else "no driver here"
        return (
            f"nvcc {facts.nvcc} needs a driver for CUDA {major}, torch is for {facts.torch_cuda} "
            f"and {driver}: set CUDA_HOME to a toolkit of CUDA {torchs}"
        )
    return ""


def choose_chips(facts: Facts) -> tuple[str, str]:
    """Choose the chips that nvcc can compile for.

    Args:
        facts: of the toolchain; a list of its own must be possible as a whole.

    Returns:
        A list such as "8.0+PTX;9.0a", and what is left out ("" for nothing).

    Raises:
        Refused: TORCH_CUDA_ARCH_LIST cannot be read, or has a chip that nvcc does not know.
    """
    asked = parse(facts.chips or CHIPS)
    left = [chip for chip in asked if not _knows(facts, *chip[:2])]
    names = ", ".join(f"sm_{number}{variant}" for number, variant, _ in left)
    if left and facts.chips:
        known = " ".join(f"{n // 10}.{n % 10}" for n in facts.known) or "other chips"
        raise Refused(
            f"TORCH_CUDA_ARCH_LIST has {facts.chips!r}, but nvcc {facts.nvcc} does not know "
            f"{names}: take it off the list (nvcc knows {known}), or set CUDA_HOME to another nvcc"
        )
    kept = [chip for chip in asked if chip not in left]
    if not kept:
        return "", f"nvcc {facts.nvcc} knows none of {names}: set CUDA_HOME to another toolkit"
    plain = {number for number, _, ptx in kept if ptx}
    missing = []
    for number, variant, _ in left:
        older = [n for n, _, _ in kept if n < number]
        if older and not any(n < number for n in plain):
            plain.add(max(older))
        how = "PTX runs there" if older else "such GPUs cannot use the CUDA part"
        missing += [f"sm_{number}{variant} ({how})"]
    chips = ";".join(f"{n // 10}.{n % 10}{v}{'+PTX' * (n in plain)}" for n, v, _ in kept)
    return chips, f"{', '.join(missing)}, unknown to nvcc {facts.nvcc}" if missing else ""


def parse(chips: str) -> list[tuple[int, str, bool]]:
    """Parse a list such as "8.0;9.0a+PTX" into (number, variant, with PTX).

    Raises:
        Refused: an entry cannot be read.
    """
    found = []
    for chip in re.split(r"[ ;,]+", chips.strip(" ;,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", chip)
        if parts is None:
            raise Refused(f"TORCH_CUDA_ARCH_LIST has {chip!r}; write it like {CHIPS}")
        found += [(int(parts[1] + parts[2]), parts[3], bool(parts[4]))]
    return found


def _knows(facts: Facts, number: int, variant: str) -> bool:
    release = _numbers(facts.nvcc)
    if facts.known:
        known = number in facts.known
    else:
        known = _SINCE.get(number, (0, 0)) <= release < _UNTIL.get(number, (999, 0))
    # nvcc lists plain chips only. Variants "a" came with 12.0, "f" with 12.9.
    first = {"": (0, 0), "a": (12, 0), "f": (12, 9)}[variant]
    return known and release >= first and number >= {"": 0, "a": 90, "f": 100}[variant]


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


def gencode(chips: str) -> list[str]:
    """Return nvcc's options for a list such as "8.0;9.0a+PTX"; any of them replace torch's own."""
    options = []
    for number, variant, ptx in parse(chips) if chips else []:
        options.append(f"-gencode=arch=compute_{number}{variant},code=sm_{number}{variant}")
        if ptx:  # of the plain chip: PTX of a variant runs on no other
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def recipe(plan: Plan, version: str) -> dict[str, Any]:
    """Sources, libraries and options of a plan's extension, as setuptools names them.

    Args:
        plan: with a part to compile.
        version: of foldcp.
    """
    sources, libraries = [*HOST], ["stdc++", "pthread", "dl"]
    common = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE}"]
    common += [f'-DFOLDCP_VERSION="{version}"']
    if plan.parts == "cuda":
        common += ["-DFOLDCP_WITH_CUDA", "-DUSE_CUDA", f'-DFOLDCP_ARCHS="{plan.chips}"']
        sources += CUDA
        libraries = ["cudart_static", "rt", *libraries]
    hidden = ["-fvisibility=hidden"]
    device = ["--threads", "2", "-Xcompiler", *hidden, *gencode(plan.chips)]
    return {
        "sources": [f"csrc/{name}" for name in sources],
        "libraries": libraries,
        "extra_compile_args": {"cxx": [*common, *hidden], "nvcc": [*common, *device]},
    }
