"""Runs that share a cache download to it once, and nothing half-made is ever found there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldcp.boltz.inputs import download
from foldcp.errors import UserError
from foldcp.runtime.files.lock import NAME

FILES = ("mols.tar", "mols", "boltz2_conf.ckpt", "boltz2_aff.ckpt")


def _stock(log: Path, die: bool = False, fail: bool = False) -> SimpleNamespace:
    """`boltz.main`, whose downloads are slow."""

    def fetch(cache: Path) -> None:
        for name in FILES:
            path = cache / name
            if path.exists():
                continue
            with log.open("a") as file:
                file.write(f"{name}\n")
            if name == "mols":
                path.mkdir()
                path = path / "ALA.pkl"
            path.write_text("half")
            time.sleep(0.02)
            if die and name == "boltz2_conf.ckpt":
                os.kill(os.getpid(), signal.SIGKILL)
            if fail and name == "boltz2_conf.ckpt":
                raise RuntimeError("the network is down")
            path.write_text("whole")

    main = SimpleNamespace(download_boltz1=fetch, download_boltz2=fetch)
    download.install(main)
    return main


def _run(main: SimpleNamespace, cache: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            main.download_boltz2(cache)
            code = 0
        finally:
            os._exit(code)
    return pid


def _whole(cache: Path) -> bool:
    """Look at what has its final name; True when all of it is there."""
    found = [path for path in cache.iterdir() if not path.name.startswith(".foldcp")]
    texts = [(p / "ALA.pkl" if p.is_dir() else p).read_text() for p in found]
    assert set(texts) <= {"whole"}, texts
    return len(found) == len(FILES)


@pytest.mark.parametrize("there", [(), ("mols.tar", "mols")])
def test_one_of_several_runs_downloads(there: tuple[str, ...], tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    cache.mkdir()
    for name in there:
        path = cache / name
        path.write_text("whole") if name != "mols" else path.mkdir()
        if name == "mols":
            (path / "ALA.pkl").write_text("whole")
    missing = [name for name in FILES if name not in there]
    killed = _run(_stock(log, die=True), cache)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    assert not _whole(cache)
    with pytest.raises(UserError, match="are not complete in .*the network is down"):
        _stock(log, fail=True).download_boltz2(cache)
    assert not _whole(cache) and not (cache / NAME).exists()
    log.unlink()
    pids = [_run(_stock(log), cache) for _ in range(3)]
    while not _whole(cache):
        time.sleep(1e-3)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert log.read_text().split() == missing
    assert sorted(path.name for path in cache.iterdir()) == sorted(FILES)
    cache.chmod(0o500)  # a complete cache needs no lock: many share one that they cannot write
    before = set(cache.iterdir())
    _stock(log).download_boltz2(cache)
    assert set(cache.iterdir()) == before
