"""Run mypy: no error in the strict folders, and no more elsewhere than pyproject.toml says.

    python tests/lint/typing_gate.py

The folders are those of the second override of [tool.mypy]; `most` of [tool.foldcp.types] may only
fall. A run with fewer errors fails, too, so that the number is lowered with the change.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    """Compare mypy's errors with what is allowed, and print those that are not."""
    settings = (ROOT / "pyproject.toml").read_text()
    strict = re.findall(r'"foldcp\.(\w+)\.\*"', settings)
    most = int(re.search(r"^\[tool\.foldcp\.types\]\nmost = (\d+)", settings, re.MULTILINE)[1])
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = [line for line in run.stdout.splitlines() if ": error: " in line]
    if run.stderr or (run.returncode and not errors):
        sys.exit(f"mypy failed:\n{run.stdout}{run.stderr}")
    wrong = [line for line in errors if line.split("/")[1] in strict]
    others = len(errors) - len(wrong)
    print("\n".join(wrong if wrong else errors if others > most else []))
    print(f"mypy: {len(wrong)} errors in {', '.join(strict)}; {others} elsewhere, {most} known")
    if others < most:
        print("fewer than known: lower `most` of [tool.foldcp.types] in pyproject.toml")
    sys.exit(bool(wrong) or others != most)


if __name__ == "__main__":
    main()
