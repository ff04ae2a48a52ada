"""Predictions from Python: `foldcp.load(...).predict(...)`, on one rank or on all of torchrun's.

Everything between the arguments and the arrays is `boltz predict` itself, switched over: the same
seed on the same mesh gives the same files, which are then read.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

import foldcp_boot
from foldcp.boltz.api import predictions
from foldcp.boltz.api.predictions import Prediction
from foldcp.boltz.command import guarded
from foldcp.boltz.command.early import check_launch
from foldcp.boltz.lightning.data import random_state, set_random_state
from foldcp.boltz.run import set_current
from foldcp.config import Config
from foldcp.errors import UserError
from foldcp.runtime import session
from foldcp.runtime.files.names import LONGEST, check
from foldcp.runtime.launch import check_version
from foldcp.runtime.place import Place
from foldcp_kernels.core.dispatch import default_impl, set_impl

MODELS = ("boltz2", "boltz1")


def load(
    model: str = "boltz2",
    *,
    checkpoint: str | Path | None = None,
    cache: str | Path | None = None,
    accelerator: str | None = None,
) -> Model:
    """Prepare one of Boltz's models for predictions; under torchrun every rank calls it.

    FOLDCP_* variables have the same meaning as for `boltz predict`; torchrun starts the ranks.

    Args:
        model: "boltz2" or "boltz1".
        checkpoint: file of the weights. None: Boltz's own, which the first prediction downloads.
        cache: folder of weights and molecules. None: Boltz's choice, BOLTZ_CACHE or ~/.boltz.
        accelerator: "gpu" or "cpu". None: a GPU if one is visible.

    Returns:
        The model; its weights are loaded with each prediction.

    Raises:
        UserError: Boltz is missing or not supported, there is no such checkpoint, or a FOLDCP_*
            variable has a wrong value.
    """
    if model not in MODELS:
        raise UserError(f"there is no model {model!r}: use {' or '.join(MODELS)}")
    if accelerator not in (None, "gpu", "cpu"):
        raise UserError(f"accelerator must be 'gpu', 'cpu' or None, got {accelerator!r}")
    if checkpoint is not None and not Path(checkpoint).expanduser().is_file():
        raise UserError(f"there is no checkpoint {checkpoint}: name the file of {model}'s weights")
    try:
        config = Config.from_env(os.environ)
    except ValueError as error:
        raise UserError(str(error)) from error
    check_launch(config, Place.find(os.environ))
    options: dict[str, Any] = {"model": model}
    options["accelerator"] = accelerator or ("gpu" if torch.cuda.is_available() else "cpu")
    for name, path in {"checkpoint": checkpoint, "cache": cache}.items():
        if path is not None:
            options[name] = str(Path(path).expanduser())
    return Model(_boltz(), options)


class Model:
    """A model of Boltz that predicts; `load` makes it.

    Args:
        main: `boltz.main`, switched over.
        options: of `boltz predict`, for every prediction.
    """

    def __init__(self, main: ModuleType, options: dict[str, Any]) -> None:
        self._main, self._options = main, options

    def __repr__(self) -> str:
        return f"foldcp.load({self._options['model']!r}) on {self._options['accelerator']}"

    def predict(
        self,
        data: str | Path | dict[str, Any],
        *,
        seed: int | None = None,
        recycling_steps: int = 3,
        sampling_steps: int = 200,
        diffusion_samples: int = 1,
        out_dir: str | Path | None = None,
        name: str = "input",
        **options: Any,
    ) -> Prediction | None:
        """Fold one complex; under torchrun every rank calls it, with the same arguments.

        Args:
            data: path of a YAML or FASTA file, or the contents of a YAML file as a dict.
            seed: seed of all random draws. The program's own generators are left as they were.
            recycling_steps: times the trunk runs again on its own result.
            sampling_steps: denoising steps of the sampler.
            diffusion_samples: structures to sample.
            out_dir: folder that keeps the files of `boltz predict`. None: they are removed.
            name: name of the input if `data` is a dict.
            options: any other option of `boltz predict`, such as `use_msa_server=True`.

        Returns:
            The prediction on rank 0, None on the others.

        Raises:
            UserError: the input or an option is wrong, or the input could not be folded; the text
                says why. With several ranks any other failure ends all of them, with one message.
        """
        options |= {"seed": seed, "recycling_steps": recycling_steps}
        options |= {"sampling_steps": sampling_steps, "diffusion_samples": diffusion_samples}
        given = {"override": True, **self._options, **options}
        arguments = _arguments(self._main.predict, given)
        if not isinstance(data, dict) and not Path(data).expanduser().is_file():
            raise UserError(f"there is no input {data}: name a YAML or FASTA file, or pass a dict")
        place = Place.find(os.environ)
        with _as_before(seed is not None):
            try:
                ranks = session.start(place, guarded.meeting_time(), signals=place.world > 1)
                ranks.patience = float(Config.from_env(os.environ).timeout)
                temporary = Path(ranks.from_root(_temporary() if ranks.is_root else None))
                try:
                    return self._fold(data, arguments, out_dir, name, temporary)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
            except _Alike as error:
                raise UserError(_in_python(str(error), self._main.predict)) from None
            except BaseException as error:
                if place.world > 1:  # the others wait for this one
                    guarded.end(error)
                session.forget()
                if isinstance(error, (RuntimeError, ValueError)) and guarded.is_ours(error):
                    message = _in_python(str(error), self._main.predict)
                    raise UserError(message) from None  # which says all
                raise

    def _fold(
        self,
        data: str | Path | dict[str, Any],
        arguments: list[str],
        out_dir: str | Path | None,
        name: str,
        temporary: Path,
    ) -> Prediction | None:
        from foldcp.boltz import switch

        path = _written(data, temporary, name) if isinstance(data, dict) else Path(data)
        path = path.expanduser()
        out = temporary if out_dir is None else Path(out_dir).expanduser()
        predict = self._main.predict
        arguments = [str(path), "--out_dir", str(out), *arguments]
        try:
            with predict.make_context("predict", arguments) as context:
                options = context.params
        except click.ClickException as error:
            raise UserError(error.format_message()) from error
        run = switch.fold(predict.callback.__wrapped__, options, apart=True)
        found = None
        if run.session.is_root and not run.failed:
            set_current(run)  # what is read here is checked as in the run
            try:
                results = out / f"boltz_results_{path.stem}"
                found = predictions.read(results, path.stem, options)
            finally:
                set_current(None)
        run.session.close()
        if run.failed:
            raise _Alike("; ".join(f"{key}: {why}" for key, why in run.failed.items()))
        return found


class _Alike(Exception):
    """Signals that an input could not be folded; raised on all ranks, after they have parted."""


def _boltz() -> ModuleType:
    """`boltz.main`, switched over."""
    foldcp_boot.install()
    try:
        check_version(ends_process=False)
        import boltz.main as main
    except ModuleNotFoundError as error:
        raise UserError(
            f"boltz is not installed for {sys.executable} ({error}): pip install 'foldcp[boltz]'"
        ) from error
    except ImportError as error:
        raise UserError(str(error)) from error
    from foldcp.boltz import switch

    switch.patch(main)  # a program may have imported it before
    return main


def _arguments(predict: click.Command, options: dict[str, Any]) -> list[str]:
    """Options by name as on the command line.

    Raises:
        TypeError: there is no such option.
    """
    known = {p.name: p for p in predict.params if isinstance(p, click.Option) and p.name}
    words = []
    for name, value in options.items():
        if name not in known or name in ("devices", "out_dir"):
            near = difflib.get_close_matches(name, known, 1)
            hint = f", did you mean {near[0]}?" if near else " (boltz predict --help lists them)"
            raise TypeError(f"boltz predict has no option {name}{hint}")
        if known[name].is_flag:
            words += [known[name].opts[0]] if value else known[name].secondary_opts[:1]
        elif value is not None:
            words += [known[name].opts[0], str(value)]
    return words


def _in_python(text: str, predict: click.Command) -> str:
    """Reword a message about command-line options for a caller in Python."""
    names = "|".join(p.name for p in predict.params if isinstance(p, click.Option) and p.name)
    return re.sub(rf"--({names})\b", r"\1", text)


def _temporary() -> str:
    return tempfile.mkdtemp(prefix="foldcp_predict_")


def _written(data: dict[str, Any], folder: Path, name: str) -> Path:
    """An input as a file, which every rank that lacks it writes whole."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)  # on another machine than rank 0's
    path = folder / f"{check(name, 'the name of the input', LONGEST)}.yaml"
    file, partial = tempfile.mkstemp(dir=folder)
    with os.fdopen(file, "w") as out:
        yaml.safe_dump(data, out, sort_keys=False)
    os.replace(partial, path)
    return path


@contextmanager
def _as_before(seeded: bool) -> Iterator[None]:
    """Leave this process as a program had it, whatever a prediction changes."""
    output, disabled, gradients = sys.stdout, logging.root.manager.disable, torch.is_grad_enabled()
    precision, kernels = torch.get_float32_matmul_precision(), default_impl()
    state = random_state() if seeded else None
    seeds = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    with warnings.catch_warnings():
        try:
            yield
        finally:
            sys.stdout = output
            logging.disable(disabled)
            torch.set_grad_enabled(gradients)
            torch.set_float32_matmul_precision(precision)
            set_impl(kernels)
            for name, value in seeds.items():  # of Lightning, for whom a program trains with it
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}
            if state is not None:
                set_random_state(state)
