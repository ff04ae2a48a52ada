"""Run `foldcp plan`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from foldcp.boltz.command import declared, early
from foldcp.boltz.command.options import check_numbers
from foldcp.boltz.inputs.sizes import InputSizes, count
from foldcp.cli.plan.show import as_json, as_text
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.planner import gpus
from foldcp.planner.plan import Plan, check, plan, remedies
from foldcp.planner.workload import Workload
from foldcp.runtime import launch

FITS, TOO_LARGE, BAD_USE = 0, 1, 2
_MSA_ROWS = 1024  # with --tokens, where --msa says nothing
_ATOMS = 8  # of a token, with --tokens, where --atoms says nothing


def main(arguments: list[str]) -> int:
    """Plan inputs, and print the plans.

    Args:
        arguments: what follows `plan`.

    Returns:
        0 if all inputs fit, 1 if one does not, 2 where the arguments or an input are wrong.
    """
    try:
        return _main(arguments)
    except click.ClickException as error:
        print(f"foldcp: {error.format_message()} (see `foldcp plan --help`)", file=sys.stderr)
    except (UserError, ValueError) as error:
        print(f"foldcp: {error}", file=sys.stderr)
    return BAD_USE


def _main(arguments: list[str]) -> int:
    options = _options(arguments)
    check_numbers(options)
    config = Config.from_env(os.environ)
    mesh, memory = options["mesh"] or config.mesh, config.memory
    cluster = gpus.parse(options["gpus"]) if options["gpus"] else _here()
    found = []
    for sizes in _inputs(options):
        workload = _workload(sizes, options)
        check(workload)
        one = plan(workload, cluster, memory, mesh)
        if options["exact"]:
            one = _exact(one)
        found.append((sizes, one, [] if one.fits else remedies(one, memory)))
    if options["json"]:
        print(json.dumps(as_json(found), indent=2))
    else:
        print("\n\n".join(as_text(*one) for one in found))
    return FITS if all(one.fits for _, one, _ in found) else TOO_LARGE


def _options(arguments: list[str]) -> dict[str, Any]:
    """Parse own options and those of `boltz predict`, which keep their names and defaults."""
    source = launch.source_of_boltz()
    command = None if source is None else declared.command(source)
    if command is None:
        launch.report_missing_boltz()
    ours: list[click.Parameter] = [
        click.Argument(["inputs"], nargs=-1, type=click.Path(path_type=Path)),
        click.Option(["--gpus"]),
        click.Option(["--mesh"]),
        click.Option(["--json"], is_flag=True),
        click.Option(["--exact"], is_flag=True),
        click.Option(["--tokens"], type=int),
        click.Option(["--atoms"], type=int),
        click.Option(["--msa"], type=int),
    ]
    theirs = [x for x in command.params if not isinstance(x, click.Argument)]
    return declared.options(click.Command("plan", params=[*ours, *theirs]), arguments)


def _exact(found: Plan) -> Plan:
    """Replace the formula's bytes by those of the real code on tensors without memory."""
    from foldcp.boltz.families.dry_run.measure import exact_stage_bytes

    exact = exact_stage_bytes(found.workload, found.setup, found.setup.size // 2)
    return replace(found, stages={x: exact.get(x, held) for x, held in found.stages.items()})


def _here() -> gpus.Cluster:
    """Describe the GPUs of this machine."""
    import torch

    listed = "name GPUs with --gpus, for example --gpus 8xh100-80 (see `foldcp plan --help`)"
    number = torch.cuda.device_count()
    if not number:
        raise UserError(f"there is no GPU in this machine: {listed}")
    each = [torch.cuda.get_device_properties(i) for i in range(number)]
    memory = min(one.total_memory for one in each)
    found = gpus.named(each[0].name, number, memory)
    if found is None:
        raise UserError(f"the rates of {each[0].name} are not known: {listed}")
    return found


def _inputs(options: Mapping[str, Any]) -> list[InputSizes]:
    given = options["inputs"]
    if options["tokens"] is not None:
        if given:
            raise UserError("give inputs or --tokens, not both")
        tokens = options["tokens"]
        atoms = options["atoms"] if options["atoms"] is not None else _ATOMS * tokens
        rows = options["msa"] if options["msa"] is not None else _MSA_ROWS
        assumed = []
        if options["atoms"] is None:
            assumed.append(f"{_ATOMS} atoms of a token assumed; --atoms says how many there are")
        if options["msa"] is None:
            assumed.append(f"{_MSA_ROWS} MSA rows assumed; --msa says how many there are")
        return [InputSizes(f"{tokens} tokens", tokens, atoms, rows, 0, tuple(assumed))]
    if options["atoms"] is not None or options["msa"] is not None:
        raise UserError("--atoms and --msa go with --tokens; those of an input are counted")
    if not given:
        raise UserError("give an input, a folder of inputs, or --tokens N")
    return [count(path, options) for one in given for path in _files(one)]


def _files(path: Path) -> list[Path]:
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist: correct the path")
        early.check_inputs(path)
        return sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the path") from error


def _workload(sizes: InputSizes, options: Mapping[str, Any]) -> Workload:
    return Workload(
        sizes.tokens,
        sizes.atoms,
        sizes.sequences,
        sizes.templates,
        samples=options["diffusion_samples"],
        parallel_samples=options["max_parallel_samples"],
        recycling_steps=options["recycling_steps"],
        sampling_steps=options["sampling_steps"] or 200,
        model=options["model"],
    )
