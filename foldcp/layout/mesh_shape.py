"""Choose the number of ranks of a mesh and its shape: arithmetic, before anything is imported."""

from __future__ import annotations

from foldcp.errors import with_ranks


def choose(world: int, spec: str = "auto") -> tuple[int, int]:
    """Pick the mesh for a number of ranks.

    Args:
        world: number of ranks.
        spec: "auto" (the most square factorisation, rows <= cols) or "RxQ", for example "2x4".

    Returns:
        (rows, cols) with rows * cols == world.

    Raises:
        ValueError: `spec` is malformed or does not fit `world`.
    """
    if spec == "auto":
        rows = max(r for r in range(1, int(world**0.5) + 1) if world % r == 0)
        return rows, world // rows
    parts = spec.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"mesh {spec!r} is not of the form RxQ: set FOLDCP_MESH=2x4 or auto")
    rows, cols = int(parts[0]), int(parts[1])
    if rows * cols != world:
        many, rest = divmod(world, rows * cols)
        several = "" if rest or not many else f", or FOLDCP_DP={many} to fold {many} inputs at once"
        raise ValueError(
            f"mesh {spec} needs {rows * cols} ranks but {world} were started: start "
            f"{rows * cols} ranks ({with_ranks(rows * cols)}), or set FOLDCP_MESH=auto{several}"
        )
    return rows, cols


def group_size(world: int, groups: int, spec: str = "auto") -> int:
    """Return the number of ranks of one data-parallel group.

    Args:
        world: number of ranks.
        groups: FOLDCP_DP.
        spec: FOLDCP_MESH, of each group.

    Raises:
        ValueError: the ranks cannot be shared out evenly.
    """
    if world % groups:
        each = "" if spec == "auto" else f", {groups} x {spec}"
        raise ValueError(
            f"FOLDCP_DP={groups} groups need a multiple of {groups} ranks{each}, but {world} were "
            f"started: start {groups * max(1, world // groups)} ranks, or set FOLDCP_DP to a "
            f"divisor of {world}"
        )
    return world // groups
