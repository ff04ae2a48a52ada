"""Imports go one way: kernels <- fabric <- rings <- modules <- boltz <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FABRIC = set(
    """agreement allocator broadcast config connect cost exchange executor layout machine memory
    mesh mesh_shape message names native plans pool program progress rates report resume schedule
    spool strategy timeline traffic transport triangle_plans under_way wire""".split()  # noqa: SIM905
)
RANK = {"foldcp_kernels": 0, "fabric": 1, "rings": 2, "modules": 3, "compat": 4, "boltz": 5}
TOP = 6  # cli, __init__, __main__


def level(module: str) -> int:
    parts = module.split(".")
    if parts[0] == "foldcp_kernels":
        return 0
    name = parts[1] if len(parts) > 1 else ""
    if name.startswith("__") and name != "__main__":
        return 0  # a constant of the package, such as its version
    return RANK["fabric"] if name in FABRIC else RANK.get(name, TOP)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def test_imports_go_one_way() -> None:
    seen = 0
    for path in [*ROOT.glob("foldcp/**/*.py"), *ROOT.glob("foldcp_kernels/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imports(path):
            top = name.split(".")[0]
            assert top != "boltz" or ".boltz." in module, f"{module} imports {name}"
            if top in ("foldcp", "foldcp_kernels") and name != "foldcp":
                seen += 1
                assert level(name) <= level(module), f"{module} imports {name}"
    assert seen > 50


def test_importing_needs_neither_boltz_nor_triton() -> None:
    code = (
        "import sys\n"
        "for name in ('boltz', 'triton', 'pytorch_lightning'): sys.modules[name] = None\n"
        "import foldcp, foldcp.exchange, foldcp.modules.pairformer, foldcp_kernels.reference\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
