"""The compile gate as a process beside the other tests: it takes minutes, and needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEST = "test_kernels_compile_for_every_chip"
CHIPS = "80,90,100,120"


class Compilation:
    """`python -m bench.aot --quick`, started at most once, at the lowest priority."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="foldcp-aot-")
        self.table = Path(self._folder.name) / "aot.csv"

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is None:
            env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            command = ["nice", sys.executable, "-m", "bench.aot", "--quick", "--chips", CHIPS]
            self._process = subprocess.Popen(
                [*command, "--out", str(self.table)], cwd=ROOT, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> tuple[int, str]:
        """(exit code, what it printed)."""
        self.start()
        said, _ = self._process.communicate()
        return self._process.returncode, said

    def stop(self) -> None:
        """End it with the session, whether it is done or not."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, 15)
            self._process.wait()


compilation = Compilation()
