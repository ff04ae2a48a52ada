"""Read inputs in a process of its own, which leaves nothing of it in this one."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from foldcp.errors import SEE_LOG, UserError


def read(work: Callable[[], None], apart: bool) -> None:
    """Read inputs.

    RDKit draws conformers of ligands from a generator that cannot be reset. In a program reading
    must not move it, or what is predicted second would not be what it would have been first.

    Args:
        work: reads them; what it leaves is on disk.
        apart: in a process of its own.

    Raises:
        UserError: the process ended otherwise than well.
    """
    if not apart:
        work()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise UserError(f"the process that reads the inputs ended with {code}: {SEE_LOG}")
