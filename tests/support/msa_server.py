"""A server of alignments on this machine, with the three requests that Boltz makes of one."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

_FILES = {True: ["pair.a3m"], False: ["uniref.a3m", "bfd.mgnify30.metaeuk30.smag30.a3m"]}


@dataclass
class Served:
    """What was asked for.

    Args:
        url: of the server; a client may append a path of its own, which comes back in `asked`.
        asked: (that path, mode, what it authenticated with) of each alignment asked for.
    """

    url: str
    asked: list[tuple[str, str, str]] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Served]:
    """Run a server: each query is aligned with itself reversed, with and without gaps."""
    jobs: dict[str, tuple[str, list[str]]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            key = self.headers.get("X-API-Key") or self.headers.get("Authorization") or ""
            client = self.path.split("/")[1]
            mode, queries = form["mode"][0], form["q"][0].split()[1::2]
            served.asked.append((client, mode, key))
            jobs[str(len(jobs))] = (mode, queries)
            self._answer(json.dumps({"id": str(len(jobs) - 1), "status": "COMPLETE"}).encode())

        def do_GET(self) -> None:
            self._answer(_archive(*jobs[self.path.split("/")[-1]]))

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _archive(mode: str, queries: list[str]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for i, name in enumerate(_FILES[mode.startswith("pair")]):
            blocks = [
                f">{101 + n}\n{query}\n>hit\n{query[::-1]}\n>gap\n{'-' * (i + 2)}{query[i + 2 :]}\n"
                for n, query in enumerate(queries)
            ]
            text = "\x00".join(blocks).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return out.getvalue()
