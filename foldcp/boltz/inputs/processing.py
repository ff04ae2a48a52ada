"""Read all inputs on the root rank, and note those that cannot be read with the reason."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from boltz.data import types
from boltz.data.msa import mmseqs2
from boltz.data.parse import schema as stock_schema

from foldcp.boltz.command import early
from foldcp.boltz.document import codes
from foldcp.boltz.document.explain import readable
from foldcp.boltz.inputs import answers, leftovers, msas, one_input, trust
from foldcp.boltz.inputs.apart import read
from foldcp.boltz.run import current
from foldcp.errors import SEE_LOG, UserError
from foldcp.runtime.files.names import Unsafe, inside, regular
from foldcp.runtime.screen.watching import Bar, Watching


def install(main: ModuleType) -> None:
    """Switch the reading of inputs over.

    Args:
        main: `boltz.main`.
    """
    main.process_input = one_input.whole_or_nothing(main.process_input)
    main.process_inputs = on_root(main.process_inputs)
    main.tqdm = _watched(main.tqdm, lambda watching: watching.each)
    mmseqs2.tqdm = _watched(mmseqs2.tqdm, lambda watching: partial(Bar, watching))
    main.run_mmseqs2 = answers.keeping(main.run_mmseqs2)
    main.parse_a3m = msas.checked(main.parse_a3m)
    main.parse_csv = msas.checked(main.parse_csv)
    main.parse_yaml = msas.unpacked(main.parse_yaml)
    main.parse_fasta = msas.unpacked(main.parse_fasta)
    for name, kind in {"parse_mmcif": "mmCIF", "parse_pdb": "PDB"}.items():
        regular_only = msas.checked_template(getattr(stock_schema, name))
        setattr(stock_schema, name, readable(regular_only, kind))
    codes.install()
    types.JSONSerializable.dump = one_input.dump_json
    answers.install()
    trust.install()


def _watched(stock: Any, ours: Callable[[Watching], Callable[..., Any]]) -> Callable[..., Any]:
    """Replace `tqdm`: while a run works, show its progress the way everything else is shown."""

    def bar(*items: Any, **options: Any) -> Any:
        run = current()
        if run is None or run.watching is None:
            return stock(*items, **options)
        return ours(run.watching)(*items, **options)

    return bar


def on_root(stock: Callable[..., None]) -> Callable[..., None]:
    """Read the inputs on the root rank and note those that could not be read."""
    stock = getattr(stock, "__wrapped__", stock)

    @wraps(stock)
    def process_inputs(data: list[Path], out_dir: Path, **options: Any) -> None:
        run = current()
        if run is None:
            stock(data=data, out_dir=out_dir, **options)
            return
        if run.session.is_root:
            early.check_names(data)
            check_folders(out_dir)
            check_cache(options)
            leftovers.drop_unfinished(out_dir)
            leftovers.drop_broken_records(out_dir / "processed" / "records")
            leftovers.drop_unusable(out_dir / "processed", bool(options.get("boltz2")))
            with tempfile.TemporaryDirectory(prefix="foldcp_") as folder:
                run.reasons = Path(folder)
                try:
                    read(partial(stock, data=data, out_dir=out_dir, **options), run.apart)
                finally:
                    for path in data:
                        if not (out_dir / "processed" / "records" / f"{path.stem}.json").exists():
                            reason = run.reasons / path.name
                            known = reason.read_text() if reason.exists() else SEE_LOG
                            run.failed[path.name] = known
                    run.reasons = None
        run.session.wait_for_root()

    return process_inputs


def check_folders(out_dir: Path) -> None:
    """Refuse a results folder whose own folders lead out of it: their files would be foreign ones.

    Raises:
        UserError: names the link.
    """
    processed = out_dir / "processed"
    names = ("manifest.json", *one_input.PLACES.values())
    folders = out_dir / "msa", out_dir / "predictions", processed
    for path in (*folders, *(processed / n for n in names)):
        try:
            if path.exists():
                inside(path, out_dir)
        except Unsafe as error:
            raise UserError(f"{error}: replace the link by a folder of its own") from error


def check_cache(options: dict[str, Any]) -> None:
    """Refuse a dictionary of molecules that is no file; Boltz-2 has a folder of them instead.

    Raises:
        UserError: names it.
    """
    try:
        if not options.get("boltz2"):
            regular(Path(options["ccd_path"]))
    except Unsafe as error:
        raise UserError(f"{error}: name another folder with --cache") from error
