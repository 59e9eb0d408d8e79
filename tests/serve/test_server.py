"""The page over HTTP: who is answered, what is refused, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest
from said import shardsim

from shardsim.serve.server import MOST_BODY_BYTES, PageServer

PLAN = "vit-22b-published-tp8"


def send(
    server: PageServer, path: str, body: Any = None, method: str = "POST", **headers: str
) -> tuple[int, Any, http.client.HTTPResponse]:
    """Return status, what came back, and the response."""
    link = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    usual = {"Content-Type": "application/json"} if method == "POST" else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    link.request(method, path, data, {**usual, **named})
    answer = link.getresponse()
    text = answer.read()
    link.close()
    if "json" in answer.getheader("Content-Type", ""):
        return answer.status, json.loads(text), answer
    return answer.status, text.decode(), answer


def test_the_page_names_no_other_address(server: PageServer) -> None:
    for path in ("/", "/page.js", "/page.css", "/colours.css"):
        status, text, answer = send(server, path, method="GET")
        assert status == 200
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w", text)
        policy = answer.getheader("Content-Security-Policy", "")
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert "innerHTML" not in resources.files("shardsim.serve").joinpath("page/page.js").read_text()


def test_predict(server: PageServer) -> None:
    status, data, _ = send(server, "/api/predict", {"plan": PLAN})
    assert status == 200
    assert data["prediction"]["fits"] is True
    assert data["seconds"] > 0
    status, data, _ = send(server, "/api/start", method="GET")
    assert data["plans"][0] == PLAN


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "0.0.0.0:1"])
def test_only_the_own_name_is_answered(server: PageServer, host: str) -> None:
    for method, path in (("GET", "/"), ("POST", "/api/predict")):
        status, data, _ = send(server, path, {"plan": PLAN}, method, Host=host)
        assert (status, list(data)) == (421, ["error"])
    port = server.server_port
    assert send(server, "/", method="GET", Host=f"localhost:{port}")[0] == 200


def test_other_sites_may_not_ask(server: PageServer) -> None:
    own = f"http://127.0.0.1:{server.server_port}"
    body = {"plan": PLAN}
    assert send(server, "/api/predict", body, Origin=own)[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        assert send(server, "/api/predict", body, Origin=origin)[0] == 403
    assert send(server, "/api/predict", body, Content_Type="text/plain")[0] == 415


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b" " * (MOST_BODY_BYTES + 1), 413, "more than"),
        (b"{", 400, "no JSON"),
        (b"[" * 60_000, 400, "no JSON"),
        (b'{"plan": NaN}', 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"1" * 10_000, 400, "no JSON"),
        (b"", 400, "no JSON"),
        (b'{"plan": "nothing"}', 400, "is not on the desk"),
    ],
)
def test_bad_bodies_are_refused(server: PageServer, body: bytes, status: int, said: str) -> None:
    found, data, _ = send(server, "/api/predict", body)
    assert found == status
    assert said in data["error"]


def test_unknown_calls_are_refused(server: PageServer) -> None:
    assert send(server, "/api/delete", {})[0] == 404
    assert send(server, "/../../etc/passwd", method="GET")[0] == 404
    assert send(server, "/", method="DELETE")[0] == 501
    status, text, head = send(server, "/", method="HEAD")
    _, page, _ = send(server, "/", method="GET")
    assert (status, text, head.getheader("Content-Length")) == (200, "", str(len(page.encode())))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as link:
        head = ["POST /api/predict HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        head += ["Transfer-Encoding: chunked", "", ""]
        link.sendall("\r\n".join(head).encode())
        assert b" 411 " in link.recv(1000)


def test_a_bug_is_told_in_one_line(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(data: Any) -> None:
        raise RuntimeError("inside\nout")

    monkeypatch.setattr(server.desk, "export", broken)
    status, data, _ = send(server, "/api/export", {"plan": PLAN})
    assert status == 500
    assert "RuntimeError" in data["error"]
    assert "inside" not in data["error"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_busy_port_is_one_line(server: PageServer) -> None:
    busy = shardsim("serve", "--port", str(server.server_port), "--no-open")
    assert busy.exit_code == 2
    assert re.fullmatch(r"error: --port \d+: cannot listen there .*\n", busy.stderr)
    named = shardsim("serve", "nothing-like-it", "--no-open")
    assert (named.exit_code, named.stderr.count("\n")) == (2, 1)


def test_it_serves_until_it_is_interrupted() -> None:
    words = ["serve", PLAN, "--port", "0", "--no-open", "--json"]
    run = subprocess.Popen(
        [sys.executable, "-m", "shardsim", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    text = ""
    while not text.rstrip().endswith("}"):
        text += run.stdout.readline()
    data = json.loads(text)
    assert data["plans"] == [PLAN]
    link = http.client.HTTPConnection("127.0.0.1", data["port"], timeout=60)
    link.request("GET", "/")
    assert link.getresponse().status == 200
    link.close()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
