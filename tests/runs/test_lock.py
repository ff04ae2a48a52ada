"""One run at a time in a folder: the lock, who takes it over, and how it is given back."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from predict_runs import Case, run_cases
from result_files import differences

from foldcp.errors import UserError
from foldcp.output.folders import Outputs
from foldcp.runtime import session
from foldcp.runtime.files import holder as holders
from foldcp.runtime.files import lock as locks
from foldcp.runtime.files.holder import Holder
from foldcp.runtime.files.lock import NAME, Held, Lock
from foldcp.runtime.files.seal import Lost
from foldcp.runtime.liveness import signals
from foldcp.runtime.place import Place

LIMIT = 30  # seconds
TAKERS = 6


def _fork(work: Callable[[], object]) -> int:
    """Do some work in a new process; its exit code is what that returns, 99 if it raises."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = int(work() or 0)
        finally:
            os._exit(code)
    return pid


def _code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _hamper(seed: int, links: bool) -> None:
    """Make every step on the way to a lock take its time; `links`: the file system has them."""
    draw = random.Random(seed)

    def slow(stock: Callable[..., object]) -> Callable[..., object]:
        def later(*args: object, **options: object) -> object:
            time.sleep(draw.choice((0, 0, 1e-4, 1e-3, 3e-3)))
            return stock(*args, **options)

        return later

    os.link = slow(os.link if links else _no_links)
    os.replace, os.unlink = slow(os.replace), slow(os.unlink)
    locks.look = slow(locks.look)


def _no_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Fail if another process is inside, too."""
    (folder / "inside").mkdir()
    time.sleep(2e-3)
    yield
    (folder / "inside").rmdir()


def _leave(folder: Path, **changes: object) -> Holder:
    """Leave the lock of a process that is gone, as it is or changed."""
    made = folder / "made"
    assert _code(_fork(lambda: made.write_bytes(Holder.own().written()) and 0)) == 0
    found = Holder.read(made.read_bytes())
    assert found is not None
    made.write_bytes(replace(found, **changes).written())
    made.replace(folder / NAME)  # at once: a holder may be looking
    return replace(found, **changes)


@pytest.mark.parametrize("links", [True, False])
def test_one_of_several_at_a_time(links: bool, tmp_path: Path) -> None:
    def work(seed: int) -> None:
        draw, until = random.Random(seed), time.monotonic() + LIMIT
        _hamper(seed, links)
        for _ in range(40):
            time.sleep(draw.random() * 2e-3)
            lock = Lock(tmp_path)
            while True:
                with suppress(Held):
                    lock.take()
                    break
                assert time.monotonic() < until
            with _alone(tmp_path):
                lock.seal.check()
            lock.release()

    assert [_code(pid) for pid in [_fork(lambda s=s: work(s)) for s in range(3)]] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_one_of_many_takes_over_from_a_dead_one(links: bool, tmp_path: Path) -> None:
    """All find the dead lock at once; two of them are killed while they take it over."""
    won = 0
    for number in range(40):
        if won >= 6 and number >= 10:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        _leave(folder)
        pipes = [os.pipe(), os.pipe()]

        def take(seed: int, folder: Path = folder, pipes: list = pipes) -> int:
            for _, end in pipes:
                os.close(end)
            _hamper(seed, links)
            if seed % TAKERS < 2:
                stock = os.replace

                def replace_and_die(*args: object) -> None:
                    if seed % TAKERS:
                        stock(*args)
                    os.kill(os.getpid(), signal.SIGKILL)

                os.replace = replace_and_die
            lock = Lock(folder)
            os.read(pipes[0][0], 1)  # until the parent lets all of them go
            try:
                lock.take()
            except Held as error:
                (folder / f"{os.getpid()}.told").write_text(str(error))
                return 1
            os.read(pipes[1][0], 1)
            lock.seal.check()
            return 0

        pids = {
            _fork(lambda s=s: take(s)): s for s in range(TAKERS * number, TAKERS * (number + 1))
        }
        for end in (pipes[0][0], pipes[1][0], pipes[0][1]):
            os.close(end)
        codes, until = {}, time.monotonic() + LIMIT
        while len(codes) < TAKERS:
            left = [pid for pid in pids if pid not in codes]
            for pid in left:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if len(left) == 1 or time.monotonic() > until:
                with suppress(OSError):
                    os.close(pipes[1][1])  # the winner may end
            time.sleep(1e-3)
        assert set(codes.values()) <= {0, 1, -signal.SIGKILL}, codes
        winners = [pid for pid, code in codes.items() if code == 0]
        dead = [pid for pid, code in codes.items() if code < 0]
        assert len(winners) == 1 or (not winners and dead)  # it was killed when all had seen it
        won += len(winners)
        told = [path.read_text() for path in folder.glob("*.told")]
        assert len(told) == list(codes.values()).count(1)
        assert all(any(f"process {p} on " in text for p in [*winners, *dead]) for text in told)
    assert won >= 6  # of the others a winner was killed


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every tenth of a second, a holder without is given up after a second."""
    for name, seconds in {"RENEW": 0.1, "STALE": 1.0, "_LOOK": 0.03, "_QUIET": 0.3}.items():
        monkeypatch.setattr(locks, name, seconds)


def test_a_holder_of_another_machine_is_known_by_its_heartbeat(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def elsewhere() -> None:
        holders.machine = lambda: ("another boot", 1)
        Lock(tmp_path).take()
        time.sleep(LIMIT)

    pid = _fork(elsewhere)
    try:
        while not (tmp_path / NAME).exists():
            time.sleep(0.01)
        time.sleep(1.5)  # longer than it may be silent
        begun = time.monotonic()
        with pytest.raises(Held, match=f"process {pid} on "):
            Lock(tmp_path).take()
        assert time.monotonic() - begun < 0.9
    finally:
        os.kill(pid, signal.SIGKILL)
        _code(pid)
    waiting = Lock(tmp_path)
    begun = time.monotonic()
    waiting.take()  # it was alive a moment ago, as far as can be told
    assert 0.7 < time.monotonic() - begun < 3
    assert f"locked by user {Holder.own().user}, process {pid}" in capfd.readouterr().err
    waiting.release()
    _leave(tmp_path, machine="another boot/1", host="n\x1b[1m1")
    now = os.stat(tmp_path / NAME).st_mtime
    os.utime(tmp_path / NAME, (now - 10, now - 10))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("its last sign of life was long ago"))
    old = Lock(tmp_path)
    old.take()
    old.release()
    assert list(tmp_path.iterdir()) == []


def test_who_has_lost_the_lock_writes_nothing(quick: None, tmp_path: Path) -> None:
    said: list[str] = []
    lock = Lock(tmp_path, said.append)
    lock.take()
    (tmp_path / NAME).unlink()  # tidied up by hand
    until = time.monotonic() + LIMIT
    while not (tmp_path / NAME).exists() and time.monotonic() < until:
        time.sleep(0.01)
    lock.seal.check()
    failed: dict[str, str] = {}
    outputs = Outputs(tmp_path / "predictions", failed.__setitem__, lock.seal)
    outputs.folder.mkdir()
    for name in ("before", "after"):
        (outputs.begin(name) / name).mkdir()
        if name == "after":
            _leave(tmp_path, user="somebody")
        outputs.complete(name)
    outputs.finish()
    assert [path.name for path in outputs.folder.iterdir()] == ["before"]
    assert list(failed) == ["after"] and "another run has it (user somebody" in failed["after"]
    while not said and time.monotonic() < until:
        time.sleep(0.01)
    assert "was taken by another run (user somebody" in said[0]
    lock.release()
    assert (tmp_path / NAME).exists()
    with pytest.raises(Lost, match="another run has it"):
        lock.seal.check()
    (tmp_path / NAME).unlink()
    with pytest.raises(Lost, match="its lock is gone"):
        lock.seal.check()


def test_whether_a_process_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Holder.own()
    pid = _fork(lambda: 0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert own.lives() and stat[0] == "Z"
    assert replace(own, pid=pid, started=stat[19]).lives() is False, "not yet waited for"
    assert _code(pid) == 0
    gone = replace(own, pid=pid, started=stat[19])
    assert gone.lives() is False
    assert replace(own, started="1").lives() is False, "its number was given to another process"
    for unknown in (
        replace(gone, machine="b/1"),
        replace(gone, machine=""),
        replace(gone, started=""),
    ):
        assert unknown.lives() is None
    hidden = replace(own, pid=1)
    monkeypatch.setattr(holders, "_stat", lambda pid: None)  # as /proc with hidepid shows it
    for error, lives in ((PermissionError, None), (ProcessLookupError, False), (None, None)):

        def kill(*_: object, error: type[OSError] | None = error) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(os, "kill", kill)
        assert hidden.lives() is lives


def test_what_else_may_stand_there(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "STALE", 0.1)
    path = tmp_path / NAME
    fields = Holder.own().written()
    for data in (
        b"",
        b"{",
        b"[]",
        b"\xff" * 9000,
        b"[" * 4000,
        fields.replace(b'"pid": ', b'"pid": -'),
    ):
        path.write_bytes(data)
        lock = Lock(tmp_path)
        lock.take()  # after a while without a sign of life
        lock.seal.check()
        lock.release()
        assert not path.exists()
    for make in (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(tmp_path / "nowhere"),
    ):
        make()
        with pytest.raises(UserError, match=f"{NAME} is not used: .*: remove it"):
            Lock(tmp_path).take()
        path.rmdir() if path.is_dir() else path.unlink()
    shown = str(replace(Holder.own(), user="a\x1b]0;b\n", host="", since=1e300))
    assert shown.startswith("user a]0;b, process ") and shown.endswith(
        "on ?, since an unknown time"
    )


def test_an_answer_that_was_lost_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server made the link; the request was sent again and found it there."""
    stock = os.link

    def twice(*args: Path) -> None:
        stock(*args)
        stock(*args)

    monkeypatch.setattr(os, "link", twice)
    lock = Lock(tmp_path)
    lock.take()
    with pytest.raises(Held):
        monkeypatch.setattr(os, "link", stock)
        Lock(tmp_path).take()
    lock.release()
    (tmp_path / f"{NAME}.left.new").write_text("by a killed process")
    os.utime(tmp_path / f"{NAME}.left.new", (1, 1))
    lock = Lock(tmp_path)
    lock.take()
    assert [p.name for p in tmp_path.iterdir()] == [NAME]
    assert _code(_fork(lock.release)) == 0 and lock.path.exists(), "a worker is not the run"
    lock.release()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_every_signal_gives_the_lock_back(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None  # after nohup
        signals._GRACE = 0.1
        signal.signal(signal.SIGINT, lambda *_: None)  # the main thread does not come back
        session.forget()
        sys.argv = ["boltz", "predict"]
        session.start(Place())
        Lock(tmp_path).take()
        (tmp_path / "ready").touch()
        time.sleep(LIMIT)

    pid = _fork(work)
    until = time.monotonic() + LIMIT
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(pid, number)
    killed = number == signal.SIGKILL
    assert _code(pid) == (-number if killed else 128 + number)
    assert (tmp_path / NAME).exists() == killed
    assert killed or "finished predictions are kept" in capfd.readouterr().err
    lock = Lock(tmp_path)
    lock.take()
    lock.release()


def test_two_predictions_into_one_folder(tiny_cache: Path, tmp_path: Path) -> None:
    """With different seeds at the same time: what is there is of one of them, and whole."""
    text = "version: 1\nsequences:\n- protein: {id: A, sequence: MQIFVKTLTG, msa: empty}\n"
    (tmp_path / "one.yaml").write_text(text)
    fast = "--accelerator cpu --num_workers 0 --sampling_steps 5 --recycling_steps 0"

    def predict(seed: str, out: str) -> Case:
        places = ["--out_dir", str(tmp_path / out), "--cache", str(tiny_cache)]
        options = [*fast.split(), "--seed", seed, "--write_full_pae", *places]
        return Case([["predict", str(tmp_path / "one.yaml"), *options]], 1)

    seeds = ("1", "2")
    cases = {f"both{seed}": predict(seed, "both") for seed in seeds}
    cases |= {f"alone{seed}": predict(seed, f"alone{seed}") for seed in seeds}
    ends = run_cases(cases, tmp_path)
    codes = {seed: ends[f"both{seed}"].codes[0] for seed in seeds}
    assert sorted(codes.values()) == [0, 1], {
        name: end.output[-2000:] for name, end in ends.items()
    }
    lost, won = sorted(seeds, key=lambda seed: -codes[seed])
    assert "foldcp: another run is at work in" in ends[f"both{lost}"].output
    results, alone = (tmp_path / out / "boltz_results_one" for out in ("both", f"alone{won}"))
    assert not any(differences(results, alone).values())
    other = tmp_path / f"alone{lost}" / "boltz_results_one"
    assert max(differences(results, other).values()) > 1e-3
    left = {path.name for path in results.iterdir()}
    assert NAME not in left and not [name for name in left if name.startswith(".")]
