"""A server on loopback that sends parts of files, counts bytes, and drops connections."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves the files of `root`.

    delay: seconds before each answer. drop_after: bytes of each response after which the connection
    is dropped. ranges: whether parts of files are sent. requests: (path, Range) of
    each. sent: bytes of all bodies.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.ranges, self.delay = root, True, 0.0
        self.drop_after: int | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        part = request.headers.get("Range")
        self.requests.append((request.path, part))
        time.sleep(self.delay)
        path = self.root / request.path.lstrip("/")
        if not path.is_file():
            request.send_error(404)
            return
        content = path.read_bytes()
        size = len(content)
        first = int(part.removeprefix("bytes=").rstrip("-")) if part and self.ranges else 0
        if first >= size:
            request.send_error(416)
            return
        request.send_response(206 if first else 200)
        request.send_header("Content-Length", str(size - first))
        if first:
            request.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        request.end_headers()
        body = content[first:][: self.drop_after]
        self.sent += len(body)
        request.wfile.write(body)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
