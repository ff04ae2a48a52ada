"""Record the fingerprints of a version of Boltz beside those that are known.

    pip download --no-deps boltz==2.2.1 && unzip boltz-2.2.1-*.whl -d /tmp/boltz-2.2.1
    python -m bench.pages.fingerprints 2.2.1 /tmp/boltz-2.2.1/boltz

Do so only for a version with which the tests pass: foldcp then takes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.machine import ROOT
from foldcp.boltz.seams import known, table
from foldcp.boltz.seams.fingerprint import of_bodies, of_file

FILE = ROOT / "foldcp/boltz/seams/known.py"
_HEAD = '''"""Fingerprints of Boltz's functions, written by `python -m bench.pages.fingerprints`.

By file and name, fingerprint to the versions that have this body; the name "" is the whole file.
"""

# fmt: off
BODIES: dict[str, dict[str, dict[str, str]]] = {
'''


def text(version: str, package: Path) -> str:
    """Return the file of fingerprints with those of one more version.

    Args:
        version: of the package.
        package: its folder `boltz`.

    Raises:
        KeyError: it lacks a function of the table.
    """
    lines = []
    for path, names in table.bodies().items():
        data = (package / path).read_bytes()
        found = {"": of_file(data), **of_bodies(data)}
        rows = [_row(path, name, found[name], version) for name in ("", *names)]
        lines.append(f'    "{path}": {{{rows[0].strip()},\n' + ",\n".join(rows[1:]) + "},")
    return _HEAD + "\n".join(lines) + "\n}\n"


def _row(path: str, name: str, found: str, version: str) -> str:
    versions = dict(known.BODIES.get(path, {}).get(name, {}))
    versions[found] = " ".join(sorted({*versions.get(found, "").split(), version}))
    listed = ", ".join(f'"{x}": "{v}"' for x, v in versions.items())
    return f'        "{name}": {{{listed}}}'


def main(argv: list[str] | None = None) -> int:
    """Write the file.

    Args:
        argv: arguments; those of the process when None.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.pages.fingerprints")
    parser.add_argument("version")
    parser.add_argument("package", type=Path, help="folder `boltz` of an unpacked wheel")
    given = parser.parse_args(argv)
    FILE.write_text(text(given.version, given.package))
    return 0


if __name__ == "__main__":
    sys.exit(main())
