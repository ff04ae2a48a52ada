"""The FOLDCP_* environment variables: the only place that reads them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from foldcp.config.precision import PRESETS, Precision, read

ROUTES = ("direct", "ring")
TRANSPORTS = ("auto", "gloo", "host", "nccl", "copy-engine", "torch-nccl")
WIRES = ("raw", "fp8")
MULTIPLICATION = ("auto", "panel-direct", "panel-ring", "channel")
ATTENTION = ("auto", "panel-direct", "panel-ring", "rows")
KERNELS = ("auto", "torch", "triton", "cuequivariance")
GRAPHS = ("auto", "0", "1")
MEMORY = ("auto", "fast", "lean")
CONTRACTIONS = ("same", "fp8")
_NAMES = (
    "NPROC", "MESH", "TRANSPORT", "MULTIPLICATION", "ATTENTION", "ROUTE", "WIRE", "NCCL_LIB",
    "NCCL_CTAS", "PRECISION", "KERNELS", "GRAPHS", "MEMORY", "CHUNK_MB", "TIMEOUT", "DP", "SECRET",
    "RESUME", "REPORT", "VERBOSE", "FORCE", "BUILD_CUDA",
)  # fmt: skip
VARIABLES = ("FOLDCP", *(f"FOLDCP_{name}" for name in _NAMES))  # BUILD_CUDA is setup.py's


@dataclass(frozen=True)
class Config:
    """Hold the settings of a run, as the FOLDCP_* variables ask for them.

    docs/variables.md is generated from this docstring and from `from_env`.

    Args:
        enabled: FOLDCP. Switch Boltz over (1) or leave it untouched (0).
        nproc: FOLDCP_NPROC. Number of ranks to start on this machine; "auto" starts one per
            visible GPU. Leave it unset under a launcher, and for one process.
        mesh: FOLDCP_MESH. Shape of the mesh, rows x columns of ranks; "auto" is the most square
            one.
        route: FOLDCP_ROUTE. Panel strategy that "auto" considers: fetch a panel from its owner
            ("direct") or from the rank that used it last ("ring", for networks with few NICs).
        transport: FOLDCP_TRANSPORT. How tiles travel between ranks; "auto" is "host" on the CPUs
            of one machine and "nccl" on GPUs, and torch.distributed where these cannot run.
        wire: FOLDCP_WIRE. Send panels as they are ("raw") or as FP8 ("fp8").
        multiplication: FOLDCP_MULTIPLICATION. Strategy of triangle multiplication; "auto" is the
            fastest one by the cost model.
        attention: FOLDCP_ATTENTION. Strategy of triangle attention; "auto" is the fastest one by
            the cost model.
        nccl_library: FOLDCP_NCCL_LIB. The NCCL library to open. Unset: the one of torch, else the
            one of the system.
        nccl_ctas: FOLDCP_NCCL_CTAS. Largest number of thread blocks, and so of SMs, that NCCL
            uses. The default is not measured yet.
        precision: FOLDCP_PRECISION. Formats of products: "fp32", "bf16" (as Boltz has them),
            "tf32" (besides TF32 in the single track and the sampler), or "fp8" (besides FP8 planes
            in triangle multiplication); then single groups, as in "tf32,tokens=bf16". "auto" is
            bf16 on CUDA and fp32 on a CPU.
        kernels: FOLDCP_KERNELS. Implementation of the local ops; "auto" is Triton on CUDA where a
            kernel covers the input, else torch. `--no_kernels` means "torch".
        graphs: FOLDCP_GRAPHS. Record sampling steps and blocks as CUDA graphs. "auto": on one GPU,
            steps without steering, and blocks where it pays. "0": never. "1": all of them,
            whatever their size, or end with an error.
        memory: FOLDCP_MEMORY. "lean" holds at most about 1,000 bytes of a pair on a GPU, and takes
            more time and host memory: smaller chunks, and z on the host where nothing reads it.
            "auto" is "lean" where "fast" would not fit.
        chunk_mb: FOLDCP_CHUNK_MB. Largest temporary of a memory-saving chunk, in 10^6 bytes.
            Unset: 8 on a CPU, 256 on CUDA.
        timeout: FOLDCP_TIMEOUT. Seconds that a rank waits for another one, and that an exchange
            may take.
        dp: FOLDCP_DP. Number of data-parallel groups: that many meshes fold different inputs at
            once.
        resume: FOLDCP_RESUME. Keep the trunk's result of unfinished inputs in this folder. On a
            cluster use a shared folder, or a local one if ranks keep their machines.
        report: FOLDCP_REPORT. Write `foldcp_report.json` (time, peak memory and bytes moved of each
            rank, and what became of each input) and `foldcp_report.html` to the results folder
            ("1") or not ("0"). Any other value is a path for the JSON.
        verbose: FOLDCP_VERBOSE. Show what otherwise only foldcp.log gets, and transport, kernels
            and swapped parts at the start.
        force: FOLDCP_FORCE. Fold an input even where the planner says that it cannot fit the
            memory ("1"). Without it such an input is left out at once, with what would make it fit.
    """

    enabled: bool = False
    nproc: int | str | None = None
    mesh: str = "auto"
    route: str = "direct"
    transport: str = "auto"
    wire: str = "raw"
    multiplication: str = "auto"
    attention: str = "auto"
    nccl_library: str = ""
    nccl_ctas: int = 8
    precision: str = "auto"
    kernels: str = "auto"
    graphs: str = "auto"
    memory: str = "auto"
    chunk_mb: int | None = None
    timeout: int = 1800
    dp: int = 1
    resume: str | None = None
    report: str = "1"
    verbose: bool = False
    force: bool = False

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read the variables.

        Args:
            environ: usually `os.environ`. A variable that is empty counts as unset.

        Returns:
            The configuration, defaults where a variable is unset.

        Raises:
            ValueError: a value is not allowed; names the variable, what it allows and what it got.
                Or there is a FOLDCP_* variable that does not exist; names the nearest that does.
        """
        get = _Reader(environ)
        secret(environ)
        get.only(VARIABLES)
        nproc = environ.get("FOLDCP_NPROC") or None
        return cls(
            enabled=get.choice("FOLDCP", ("0", "1"), "0") == "1",
            nproc=nproc if nproc in (None, "auto") else get.count("FOLDCP_NPROC", 1, "auto or "),
            mesh=get.mesh("FOLDCP_MESH", cls.mesh),
            route=get.choice("FOLDCP_ROUTE", ROUTES, cls.route),
            transport=get.choice("FOLDCP_TRANSPORT", TRANSPORTS, cls.transport),
            wire=get.choice("FOLDCP_WIRE", WIRES, cls.wire),
            multiplication=get.choice("FOLDCP_MULTIPLICATION", MULTIPLICATION, cls.multiplication),
            attention=get.choice("FOLDCP_ATTENTION", ATTENTION, cls.attention),
            nccl_library=environ.get("FOLDCP_NCCL_LIB") or cls.nccl_library,
            nccl_ctas=get.count("FOLDCP_NCCL_CTAS", cls.nccl_ctas),
            precision=get.precision("FOLDCP_PRECISION", cls.precision),
            kernels=get.choice("FOLDCP_KERNELS", KERNELS, cls.kernels),
            graphs=get.choice("FOLDCP_GRAPHS", GRAPHS, cls.graphs),
            memory=get.choice("FOLDCP_MEMORY", MEMORY, cls.memory),
            chunk_mb=get.count("FOLDCP_CHUNK_MB", 1) if environ.get("FOLDCP_CHUNK_MB") else None,
            timeout=get.count("FOLDCP_TIMEOUT", cls.timeout),
            dp=get.count("FOLDCP_DP", cls.dp),
            resume=environ.get("FOLDCP_RESUME") or None,
            report=get.switch_or_path("FOLDCP_REPORT", cls.report),
            verbose=get.choice("FOLDCP_VERBOSE", ("0", "1"), "0") == "1",
            force=get.choice("FOLDCP_FORCE", ("0", "1"), "0") == "1",
        )

    @property
    def report_path(self) -> str | None:
        """Path that FOLDCP_REPORT names, None where it names none."""
        return None if self.report in ("0", "1") else self.report

    def precision_on(self, device_type: str) -> Precision:
        """Return the formats to compute in on a "cpu" or "cuda" device."""
        if self.precision != "auto":
            return read(self.precision)
        return PRESETS["bf16" if device_type == "cuda" else "fp32"]


def order_nccl(environ: MutableMapping[str, str]) -> str:
    """Ask NCCL to run what different communicators start on a GPU in the order of the calls.

    torch's communicators share the GPU with those of a mesh; without one order they may wait for
    each other in a circle. Must be called before NCCL is used (it reads the variable once); NCCL
    knows it from 2.26 on.

    Args:
        environ: usually `os.environ`. A value that is there already is left.

    Returns:
        The value.
    """
    return environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


def shares_gpus(environ: Mapping[str, str]) -> bool:
    """Tell whether NCCL was asked to take several ranks on one GPU."""
    return environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def local_rank(environ: Mapping[str, str], rank: int) -> int:
    """Return this rank's position on its machine, as torchrun or srun says it, else its rank.

    Args:
        environ: usually `os.environ`.
        rank: this rank.
    """
    return int(environ.get("LOCAL_RANK") or environ.get("SLURM_LOCALID") or rank)


def secret(environ: Mapping[str, str]) -> str:
    """Return FOLDCP_SECRET, which seals messages between ranks; `Config` gets printed.

    Raises:
        ValueError: it is so short that it could be guessed.
    """
    found = environ.get("FOLDCP_SECRET") or ""
    if 0 < len(found) < 16:
        raise ValueError(
            f"FOLDCP_SECRET must have at least 16 characters, got {len(found)}: "
            'export FOLDCP_SECRET="$(openssl rand -hex 16)"'
        )
    return found


def asks_for_ranks(environ: Mapping[str, str]) -> bool:
    """Tell whether FOLDCP_NPROC asks for ranks on this machine, whatever its value is worth."""
    return bool(environ.get("FOLDCP_NPROC"))


def resumes(environ: Mapping[str, str]) -> bool:
    """Tell whether FOLDCP_RESUME names a folder."""
    return bool(environ.get("FOLDCP_RESUME"))


class _Reader:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def only(self, known: tuple[str, ...]) -> None:
        """Refuse variables that do not exist: what a misspelt one asks for would not be done."""
        plain = {_plain(k): k for k in known[1:]}
        for name in sorted(self.environ):
            if name in known or not (name.startswith("FOLDCP_") or _plain(name) in plain):
                continue
            near = difflib.get_close_matches(_plain(name), plain, 1, 0.86)
            hint = f"did you mean {plain[near[0]]}? Otherwise unset it" if near else "unset it"
            listed = "`foldcp predict --help` lists all of them"
            raise ValueError(f"there is no variable {name}: {hint} ({listed})")

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.environ.get(name) or default
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        return value

    def precision(self, name: str, default: str) -> str:
        value = (self.environ.get(name) or default).lower()
        if value != "auto":
            try:
                read(value)
            except ValueError as error:
                raise ValueError(
                    f"{name} must be auto or a precision, got {value!r}: {error}"
                ) from None
        return value

    def switch_or_path(self, name: str, default: str) -> str:
        return self.environ.get(name) or default

    def count(self, name: str, default: int, also: str = "") -> int:
        value = self.environ.get(name) or str(default)
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise ValueError(f"{name} must be {also}a whole number of at least 1, got {value!r}")
        return int(value)

    def mesh(self, name: str, default: str) -> str:
        value = (self.environ.get(name) or default).lower()
        if value != "auto" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
            raise ValueError(f"{name} must be auto or ROWSxCOLUMNS, for example 2x4, got {value!r}")
        return value


def _plain(name: str) -> str:
    """A variable's name without what is easily mistyped: case and underscores."""
    return name.upper().replace("_", "")
