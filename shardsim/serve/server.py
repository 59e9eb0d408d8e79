"""The page and its answers over HTTP, on this machine alone.

Requests are taken from 127.0.0.1 under that name or localhost, so that no other site's name can
stand for it (DNS rebinding), and answers are asked for as JSON from the page's own origin, which no
other site may do. Nothing is read from or written to a file that a request names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from shardsim.errors import ShardsimError, one_line
from shardsim.serve.desk import Desk
from shardsim.views.colours import root_css
from shardsim.views.write import json_text

ADDRESS = "127.0.0.1"
HOSTS = (ADDRESS, "localhost")
MOST_BODY_BYTES = 64 * 1024
PATIENCE_S = 30.0  # with a client that says nothing
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class PageServer(ThreadingHTTPServer):
    """Serves the page of a desk; `port` 0 takes a free one. Raises `ShardsimError` if it cannot."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int) -> None:
        """Begin to listen."""
        self.desk = desk
        self.files = {path: _file(name, kind) for path, (name, kind) in PAGE.items()}
        self.files["/colours.css"] = (root_css().encode(), "text/css; charset=utf-8")
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ShardsimError(
                f"--port {port}: cannot listen there ({error.strerror}); --port 0 takes a free one"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what went wrong; a client that went away is no news."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"error: {one_line(repr(error))}", file=sys.stderr)


def _file(name: str, kind: str) -> tuple[bytes, str]:
    data = resources.files("shardsim.serve").joinpath("page", name).read_bytes()
    return data, f"{kind}; charset=utf-8"


class _Refused(Exception):
    """A request that is none of the page's: a status, and why in one line."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "shardsim"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        """Send a file of the page, or what it must know at its start."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """Say what a GET would send, and no more."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer what the page asks."""
        self._answer(self._post)

    def _get(self) -> tuple[bytes, str]:
        path = urlsplit(self.path).path
        if path == "/api/start":
            return _json(self.server.desk.start())
        if path not in self.server.files:
            raise _Refused(HTTPStatus.NOT_FOUND, "no such page")
        return self.server.files[path]

    def _post(self) -> tuple[bytes, str]:
        desk = self.server.desk
        calls: Mapping[str, Callable[[Any], Any]] = {
            "/api/predict": desk.predict,
            "/api/explain": desk.explain,
            "/api/search": desk.search,
            "/api/export": desk.export,
        }
        if self.path not in calls:
            raise _Refused(HTTPStatus.NOT_FOUND, "no such call")
        return _json(calls[self.path](self._asked()))

    def _asked(self) -> Any:
        """Return the JSON of a request; raise `_Refused` for what is none, or too large."""
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers['Host']}":
            raise _Refused(HTTPStatus.FORBIDDEN, "asked from another site")
        length = self.headers.get("Content-Length", "")
        known = length.isascii() and length.isdigit() and len(length) < 20
        if not known or "Transfer-Encoding" in self.headers:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > MOST_BODY_BYTES:
            why = f"more than {MOST_BODY_BYTES:,} bytes"
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, why)
        try:
            return json.loads(self.rfile.read(int(length)), parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise _Refused(HTTPStatus.BAD_REQUEST, "what was sent is no JSON") from None

    def _answer(self, make: Callable[[], tuple[bytes, str]]) -> None:
        """Send what `make` returns, or in one line why there is nothing."""
        status = HTTPStatus.OK
        try:
            self._check_host()
            data, kind = make()
        except _Refused as error:
            status = error.status
            self.close_connection = True  # what it sent was not read
            data, kind = _json({"error": str(error)})
        except ShardsimError as error:
            status = HTTPStatus.BAD_REQUEST
            data, kind = _json({"error": one_line(error)})
        except OSError:
            raise
        except Exception as error:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            name = type(error).__name__
            print(f"error: {one_line(f'{self.path}: {error!r}')}", file=sys.stderr)
            data, kind = _json({"error": f"shardsim could not answer that ({name}): a bug of its"})
        self._send(status, data, kind)

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host") or [""]
        if len(hosts) > 1 or (hosts[0].rpartition(":")[0] not in HOSTS and hosts[0] not in HOSTS):
            why = f"this page is served to {' and '.join(HOSTS)} alone"
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, why)

    def _send(self, status: HTTPStatus, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is no request that is known, in the form of all other answers."""
        self.close_connection = True
        status = HTTPStatus(code)
        self._send(status, *_json({"error": status.phrase}))

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""


def _json(data: Any) -> tuple[bytes, str]:
    return json_text(data).encode(), "application/json; charset=utf-8"


def _no_number(text: str) -> Any:
    raise ValueError(text)
