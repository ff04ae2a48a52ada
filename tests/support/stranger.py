"""Two ranks and a stranger, who writes into their store: `python stranger.py FOLDER` prints JSON.

Everything is imported once; ranks and stranger are forks. Where it may, the stranger becomes
another user first.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from logged import fork

SECRET = "of this run, which is not told"
OTHER_USER = 65534
LIMIT = 40.0  # seconds
# What the stranger writes to. The ranks have met once, and beat about once a second.
RUN = "foldcp/0/"
KEYS = {
    "meeting": ["all/2/0"],
    "root": ["root/3"],
    "beat": ["beat/0", "beat/1"],
    "peer": ["peer/0", "peer/1"],
    "other": ["other", "all/9/0"],
}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo run >> {self.path}",)


def run_cases(folder: Path) -> dict[str, Any]:
    """Run every case in one process; per case the exit codes and what was printed."""
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)  # the stranger's payload may write there, whoever runs it
    ended = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "FOLDCP": "0"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout.splitlines()[-1])


def _rank(rank: int, port: int, folder: Path, secret: str) -> None:
    import torch

    from foldcp.config import Config
    from foldcp.runtime import session
    from foldcp.runtime.place import Place

    variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FOLDCP_SECRET": secret}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        run = session.start(Place.find(os.environ), LIMIT)
        assert run.gather(rank) == [0, 1]
        (folder / f"ready{rank}").touch()
        while not (folder / "struck").exists():
            time.sleep(0.02)
        time.sleep(1.0)  # the watchers look at beats meanwhile
        time.sleep(0.0 if rank else 0.7)  # rank 1 reads before rank 0 writes
        assert run.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        time.sleep(0.0 if rank else 0.7)
        assert run.from_root("told" if rank == 0 else None) == "told"
        mesh = run.form(1, 2, torch.device("cpu"), Config(transport="gloo", timeout=20))
        assert mesh.ranks.all_gather_object(rank) == [0, 1]
        run.close()
    except BaseException as error:
        session.end(str(error))


def _strike(case: str, port: int, folder: Path, payload: Path) -> None:
    from torch.distributed import TCPStore

    from foldcp.fabric import message

    until = time.monotonic() + LIMIT
    while not all((folder / f"ready{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < until
        time.sleep(0.02)

    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(OTHER_USER)
        os.setuid(OTHER_USER)
    store = TCPStore("127.0.0.1", port, timeout=datetime.timedelta(seconds=10))
    kind, _, what = case.partition(" ")
    evil = pickle.dumps(Payload(payload))
    if kind == "counter":
        store.add(RUN + what, 1)
        return
    for key in (RUN + key for key in KEYS[what]):
        # The second and third are whole messages, with a seal of no secret and of another one.
        if kind != "pickle":
            message.use_secret("" if kind == "unsealed" else "a guess of the secret")
            evil = message.pack([json.dumps("x"), evil], key)
        store.set(key, evil)


def _one(case: str, folder: Path, payload: Path, secrets: tuple[str, str]) -> dict[str, Any]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    ranks = [fork(log, _rank, rank, port, folder, secrets[rank]) for rank in (0, 1)]
    if case:
        stranger = fork(folder / "stranger", _strike, case, port, folder, payload)
        assert os.waitpid(stranger, 0)[1] == 0, (folder / "stranger").read_text()
    (folder / "struck").touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    # Torch's store writes a trace when who serves it leaves first.
    said = [line for line in log.read_text().splitlines() if line.startswith("foldcp: ")]
    return {"codes": codes, "said": said}


def main(folder: Path) -> None:
    """Run the cases one after the other."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import foldcp.fabric.mesh  # noqa: F401

    payload = folder / "open" / "made"
    cases = ["pickle meeting", "unsealed meeting", "guessed root", "pickle beat", "unsealed peer",
             "pickle other", "counter failed"]  # fmt: skip
    found = {c: _one(c, folder / str(i), payload, (SECRET, SECRET)) for i, c in enumerate(cases)}
    found["other secret"] = _one("", folder / "s", payload, (SECRET, SECRET + "!"))
    # Without a secret the stranger's own message is a message; what is in it is still not run.
    found["no secret"] = _one("unsealed meeting", folder / "n", payload, ("", ""))
    found["made"] = payload.exists()
    pickle.load(io.BytesIO(pickle.dumps(Payload(payload))))
    found["would have"] = payload.exists()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
