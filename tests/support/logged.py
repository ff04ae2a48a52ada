"""Work in a forked process whose output is kept."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any


def fork(log: Path, work: Any, *arguments: Any) -> int:
    """Do work in a forked process, which then ends with its exit code.

    Args:
        log: file that its output is added to.
        work: is called with the arguments; 1 is the exit code where it raises.

    Returns:
        Number of the process.
    """
    pid = os.fork()
    if pid:
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    code = 1
    try:
        work(*arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
