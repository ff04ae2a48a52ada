"""Refuse a Boltz whose functions are not those that foldcp was made for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from foldcp.boltz.seams.fingerprint import of_bodies, of_file
from foldcp.boltz.seams.known import BODIES
from foldcp.runtime import launch

_NAMED = 3  # functions that a message names


def require(main: ModuleType, ends_process: bool) -> None:
    """Refuse Boltz unless foldcp knows every function that it replaces or relies on.

    Args:
        main: the module `boltz.main`, which need not have been executed.
        ends_process: end all ranks instead of raising.

    Raises:
        ImportError: names a function that differs.
    """
    assert main.__spec__ is not None
    differ = differing(reader(main.__spec__))
    if differ:
        launch.refuse(refusal(launch.installed()[1], differ), ends_process)


def differing(read: Callable[[str], bytes]) -> list[str]:
    """List the functions that differ from those that foldcp knows.

    A file that is known as a whole is not parsed: all of them take 2 ms, one that is not 5 to 60.

    Args:
        read: returns the source of a file, by its path below the folder of `boltz`; OSError where
            there is none.

    Returns:
        Their names, such as `boltz.main.process_input`, with "(no source)" where there is none.
    """
    found = []
    for path, known in BODIES.items():
        module = f"boltz.{path.removesuffix('.py').replace('/', '.')}"
        names, why = [name for name in known if name], ""
        try:
            data = read(path)
            if of_file(data) in known[""]:
                continue
            bodies = of_bodies(data)
            names = [name for name in names if bodies.get(name) not in known[name]]
        except OSError:
            why = " (no source)"
        except (SyntaxError, ValueError):
            why = " (no Python)"
        found += [f"{module}.{name}{why}" for name in names]
    return found


def refusal(version: str, differ: list[str]) -> str:
    """Say that a Boltz cannot be used, why, and what to do.

    Args:
        version: of the installed Boltz, as it says.
        differ: from `differing`, not empty.
    """
    names = ", ".join(differ[:_NAMED])
    more = f" and {len(differ) - _NAMED} more" if len(differ) > _NAMED else ""
    known = versions()
    verb = "differ" if len(differ) > 1 else "differs"
    made = "versions" if len(known) > 1 else "version"
    return (
        f"boltz {version}: {names}{more} {verb} from what foldcp replaces or relies on ({made} "
        f"{', '.join(known)}): `pip install --force-reinstall --no-deps boltz=={known[-1]}`, or "
        "unset FOLDCP to run Boltz without it"
    )


def versions() -> list[str]:
    """List the versions of Boltz of which every function in the table is known."""
    of_each = [
        set(" ".join(known.values()).split())
        for names in BODIES.values()
        for name, known in names.items()
        if name
    ]
    return sorted(set.intersection(*of_each))


def reader(main: ModuleSpec) -> Callable[[str], bytes]:
    """Return a function that reads Boltz's sources where its loader finds them, also in a zip.

    Args:
        main: of the module `boltz.main`.
    """
    folder, get_data = Path(str(main.origin)).parent, getattr(main.loader, "get_data", None)

    def read(path: str) -> bytes:
        if get_data is None:
            raise FileNotFoundError(path)
        return bytes(get_data(str(folder / path)))

    return read
