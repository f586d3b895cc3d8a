"""Serves one page to one browser on this machine, and takes its answers.

Only named files, only below a random path, only on the loopback interface. The headers isolate the page, without
which a browser gives it no shared memory and so no threads.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

_TYPES = {".html": "text/html", ".mjs": "text/javascript", ".json": "application/json", ".wasm": "application/wasm"}
_MAX_EVENT_BYTES = 32 * 1024 * 1024
_QUIET_S = 60.0

Route = Path | bytes


class PageServer:
    """A context: `url` is the page. on_event gets each posted body; False answers 400, which the page takes as an end.

    routes: path below the page's folder → a file, or bytes. The page is the route "page.html".
    """

    def __init__(self, routes: Mapping[str, Route], on_event: Callable[[bytes], bool]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(routes, on_event, secrets.token_urlsafe(24)))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def url(self) -> str:
        handler = self._server.RequestHandlerClass
        return f"http://127.0.0.1:{self._server.server_address[1]}/{handler.token}/page.html"  # type: ignore[attr-defined]

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


def _handler(
    routes: Mapping[str, Route], on_event: Callable[[bytes], bool], secret: str
) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        token = secret
        timeout = _QUIET_S

        def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
            name = self._below()
            found = routes.get(name) if name else None
            if found is None:
                self._answer(404, b"", "text/plain")
            elif isinstance(found, bytes):
                self._answer(200, found, _TYPES.get(Path(name).suffix, "application/octet-stream"))
            else:
                with found.open("rb") as file:
                    self._head(200, found.stat().st_size, _TYPES.get(found.suffix, "application/octet-stream"))
                    shutil.copyfileobj(file, self.wfile, 1 << 20)

        def do_POST(self) -> None:  # noqa: N802
            length = self.headers.get("Content-Length", "")
            if self._below() != "events" or not length.isascii() or not length.isdigit():
                self._answer(404, b"", "text/plain")
                return
            if int(length) > _MAX_EVENT_BYTES:
                self._answer(413, b"", "text/plain")
                return
            body = self.rfile.read(int(length))
            with lock:
                good = on_event(body)
            self._answer(200 if good else 400, b"", "text/plain")

        def _below(self) -> str:
            """The path below the page's folder, "" for anything else."""
            start = f"/{secret}/"
            given = self.path.partition("?")[0]
            return given[len(start) :] if secrets.compare_digest(given[: len(start)].encode(), start.encode()) else ""

        def _head(self, status: int, length: int, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self._head(status, len(body), kind)
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - inherited name
            """Nothing: requests are the page's own."""

        def handle(self) -> None:
            """A browser that goes away in the middle of a file is no event here."""
            try:
                super().handle()
            except OSError:
                self.close_connection = True

    return Handler
