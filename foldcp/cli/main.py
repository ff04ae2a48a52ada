"""The `foldcp` command: run Boltz on several ranks, or say what this machine can do."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path

import foldcp_boot
from foldcp import __version__
from foldcp.boltz.command import early
from foldcp.config import VARIABLES, Config
from foldcp.errors import UserError
from foldcp.layout import mesh_shape
from foldcp.runtime import launch
from foldcp.runtime.place import Place

# torch takes a second to import: `--help`, `--version` and wrong arguments do without it.

USAGE = """usage: foldcp predict INPUT [--nproc N|auto] [--mesh RxQ] [options of boltz predict]
       foldcp boltz predict INPUT [options]    Boltz in this process, switched over
       foldcp plan INPUT [--gpus 8xh100-80]    what a prediction takes, before it runs
       foldcp doctor [--json]                  what this machine can do, and what it lacks
       foldcp report DIR                       a page about a results folder
       foldcp compare A B                      are two predictions the same?
       foldcp bench kernels|block|predict|rings|tune ...  time this machine (in a clone)
       foldcp --version
       foldcp COMMAND --help
"""
_OWN = {"--nproc": ("FOLDCP_NPROC", "4"), "--mesh": ("FOLDCP_MESH", "2x2")}  # with an example
BENCHES = ("kernels", "block", "predict", "rings", "tune")
_HELP = {
    "predict": """usage: foldcp predict INPUT [--nproc N|auto] [--mesh RxQ] [OPTIONS]

Fold one input or a folder of them with Boltz on several ranks of this machine.

  --nproc N|auto   ranks to start (FOLDCP_NPROC); auto: one per visible GPU
  --mesh RxQ       mesh of ranks (FOLDCP_MESH), for example 2x4; auto: the most square one

Everything else is handed to `boltz predict`, see `boltz predict --help`. `foldcp run predict ...`
is the same. Variables (docs/variables.md explains them):
""",
    "boltz": """usage: foldcp boltz predict INPUT [options of boltz predict]

Run Boltz's own command in this process with FOLDCP=1, for launchers that start the ranks
themselves. Variables (docs/variables.md explains them):
""",
    "plan": """usage: foldcp plan INPUT ... [--gpus 8xh100-80] [--mesh RxQ] [--json] [OPTIONS]
       foldcp plan --tokens N [--atoms A] [--msa ROWS] [--gpus ...] ...

Say whether inputs fit, with which mesh, strategies and memory mode, and how long they take by the
model; where one does not fit, what would. Ends with 0 when all fit, 1 when one does not, 2 when
something is wrong with an argument or an input.

  --gpus G   COUNTxNAME[-GB] or NODESxCOUNTxNAME[-GB], as 1xrtx4090 or 2x8xh100-80; the GPUs of this
             machine where it is not given. NAME is rtx3090, rtx4090, rtx5090, a5000, a6000, l4,
             l40s, a100 (-40 or -80), h100, h200, b200 or b300
  --mesh M   only this mesh
  --json     print one JSON object
  --exact    count the plan's bytes with the real code on tensors without memory (a minute or so)

Options of `boltz predict` keep their names: --diffusion_samples, --max_parallel_samples,
--recycling_steps, --sampling_steps, --max_msa_seqs, --model, --cache. FOLDCP_MEMORY counts, too.
""",
    "doctor": """usage: foldcp doctor [--json]

Print what this machine can do: versions, GPUs, links, kernels, extension, transport, meshes,
limits; and each problem with its remedy. Ends with 1 when Boltz is missing or of a version that is
not supported, or when something that a FOLDCP_* variable asks for cannot run.

  --json   print the same as JSON
""",
    "report": """usage: foldcp report DIR [--only NAME ...] [--out FILE]

Write foldcp_report.html for a results folder (boltz_results_...) of foldcp or of stock Boltz: the
run, if foldcp_report.json is there, and of each prediction pLDDT, PAE, ipTM and its files.

  --only NAME ...   only these inputs
  --out FILE        the page, instead of foldcp_report.html in the results folder
""",
    "compare": """usage: foldcp compare A B [--model K]

Compare two predictions: results folders of `boltz predict` (boltz_results_...), folders of one
prediction, or structures (.cif, .pdb). Prints RMSD, lDDT and the differences of pLDDT, PAE, PDE,
pTM and ipTM; ends with 0 when all are within what float32 rounding explains, 1 when not.

  --model K   of each prediction, by rank (0)
""",
    "bench": """usage: foldcp bench kernels|block|predict|rings|tune [options]

Time this machine. The benches are in a clone of the repository, not in a wheel. Tables go to the
folder foldcp_bench here, or to what --out names; tune keeps what it finds in your cache. `foldcp
bench NAME --help` lists the options of one.
""",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        argv: arguments; those of the process when None.
    """
    foldcp_boot.open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "predict": _run, "run": _run, "boltz": _boltz, "doctor": _doctor,
        "report": _report, "compare": _compare, "bench": _bench, "plan": _plan,
    }  # fmt: skip
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    elif arguments and arguments[0].partition("=")[0] in _OWN:
        arguments = ["run", *arguments]
    command, rest = "".join(arguments[:1]) or "--help", arguments[1:]
    try:
        if command == "--version":
            print(f"foldcp {__version__}")
        elif command in ("-h", "--help"):
            print(USAGE, end="")
        elif command not in commands:
            near = difflib.get_close_matches(command, commands, 1)
            meant = f"did you mean {near[0]}? Else " if near else ""
            offered = (
                f"{meant}use predict, boltz, plan, doctor, report, compare or bench "
                "(see `foldcp --help`)"
            )
            raise UserError(f"no command {command!r}: {offered}")
        elif _asks_for_help(command, rest):
            print(_help(command), end="")
        else:
            sys.exit(commands[command](arguments if command == "predict" else rest))
    except (UserError, ValueError) as error:
        sys.exit(f"foldcp: {error}")


def _asks_for_help(command: str, rest: list[str]) -> bool:
    asked = {"-h", "--help"}
    if command in ("predict", "run"):
        return bool(asked & set(rest))
    return rest[:1] in (["-h"], ["--help"])


def _help(command: str) -> str:
    name = "predict" if command == "run" else command
    listed = "".join(f"  {variable}\n" for variable in VARIABLES[1:-1])
    return _HELP[name] + (listed if name in ("predict", "boltz") else "")


def _run(arguments: list[str]) -> int:
    """`foldcp predict` or `foldcp run`: start the ranks of this machine, each of which runs Boltz.

    Options of foldcp itself may stand before `predict` or after it.
    """
    own: dict[str, str] = {}
    others: list[str] = []
    while arguments:
        word = arguments.pop(0)
        name, equals, value = word.partition("=")
        if name not in _OWN:
            others.append(word)
            continue
        variable, example = _OWN[name]
        value = value if equals else "".join(arguments[:1])
        if not value or value.startswith("--"):
            raise UserError(f"{name} needs a value, for example {name} {example}")
        own[variable] = name
        os.environ[variable] = value
        del arguments[: not equals]
    arguments = others
    if arguments[:1] != ["predict"]:
        got = arguments[0] if arguments else "nothing"
        raise UserError(
            f"foldcp run expects `predict` after its own options, got {got!r}: type "
            "`foldcp predict INPUT ...` (see `foldcp predict --help`)"
        )
    os.environ["FOLDCP"] = "1"
    try:
        config = Config.from_env(os.environ)
    except ValueError as error:
        variable, _, rest = str(error).partition(" ")
        raise UserError(f"{own.get(variable, variable)} {rest}") from error
    if Place.find(os.environ).world > 1:
        raise UserError(
            "foldcp starts the ranks itself and cannot run under torchrun or srun: start "
            "`boltz predict ...` (srun) or `-m boltz.main predict ...` (torchrun) with FOLDCP=1"
        )
    if util.find_spec("boltz") is None:
        launch.report_missing_boltz()
    wanted = _processes(config)
    os.environ["FOLDCP_NPROC"] = str(wanted)
    source = launch.source_of_boltz()
    if source is not None:
        early.refuse(arguments, source, os.environ)
    nproc = launch.resolve_processes(wanted, arguments)
    os.environ["FOLDCP_NPROC"] = str(nproc)
    if nproc > 1:
        mesh_shape.choose(mesh_shape.group_size(nproc, config.dp, config.mesh), config.mesh)
        return launch.run_ranks(nproc, arguments)
    return _boltz(arguments)


def _processes(config: Config) -> int | str:
    """Number of ranks that is asked for, or "auto"."""
    if config.nproc is None and config.mesh != "auto":
        rows, _, cols = config.mesh.partition("x")
        return int(rows) * int(cols) * config.dp
    return config.nproc or "auto"


def _boltz(arguments: list[str]) -> int:
    """`foldcp boltz`: Boltz's own command in this process, switched over."""
    os.environ["FOLDCP"] = "1"
    sys.argv = ["boltz", *arguments]
    foldcp_boot.install()
    import_module(foldcp_boot.TARGET).cli()
    return 0


def _compare(arguments: list[str]) -> int:
    """Run `foldcp compare`: two results folders or structures."""
    from foldcp.cli import compare

    return compare.main(arguments)


def _doctor(arguments: list[str]) -> int:
    """Run `foldcp doctor`."""
    from foldcp.cli.doctor import command

    return command.main(arguments)


def _plan(arguments: list[str]) -> int:
    """Run `foldcp plan`."""
    from foldcp.cli.plan import command

    return command.main(arguments)


def _report(arguments: list[str]) -> int:
    """Run `foldcp report`."""
    from foldcp.cli import report

    return report.main(arguments)


def _bench(arguments: list[str]) -> int:
    """`foldcp bench`: one of the benches of the repository, which a wheel does not contain."""
    root = Path(__file__).parents[2]
    if not (root / "bench" / "kernels.py").is_file():
        raise UserError(
            "foldcp bench needs a clone of the repository, and this foldcp is installed in "
            f"{root}: in a clone run `pip install -e . --no-build-isolation`, then foldcp bench"
        )
    name, *rest = arguments or ["nothing"]
    if name not in BENCHES:
        raise UserError(f"foldcp bench expects one of {', '.join(BENCHES)}, got {name!r}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return import_module(f"bench.{name}").main(rest)
