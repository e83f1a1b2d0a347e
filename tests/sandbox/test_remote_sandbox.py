"""Sandbox servers that people run themselves: the same outcomes over HTTP, and failures that abstain."""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from coterie.errors import UserError
from coterie.sandbox.base import Limits, Program, SandboxError
from coterie.sandbox.make import make_sandbox
from coterie.sandbox.remote import Remote, SandboxServer


@pytest.fixture(scope="module")
def local():
    try:
        made = make_sandbox("auto", num_workers=1)
    except UserError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def test_outcomes_are_the_same_over_http(local):
    server = SandboxServer(local)
    remote = make_sandbox(server.url)
    programs = [
        Program("def f(x): return (x, True, 1.5)", [[1], ["é"]], "f"),
        Program("def f(x): return 1 / x", [[0], [4]], "f"),
        Program("print(input()[::-1])", ["abc\n"]),
        Program("while True: pass", [[]], "f", Limits(wall_seconds=0.2)),
    ]
    assert remote.run_all(programs) == local.run_all(programs)
    assert local.report in remote.report
    remote.close()
    server.close()


def test_a_token_is_asked_for(local, monkeypatch):
    server = SandboxServer(local, token="sesame")
    with pytest.raises(SandboxError, match="401"):
        make_sandbox(server.url)
    assert httpx.post(f"{server.url}/run", json={"programs": []}).status_code == 401
    monkeypatch.setenv("COTERIE_SANDBOX_TOKEN", "sesame")
    remote = make_sandbox(server.url)
    assert remote.run(Program("def f(): return 1", [[]], "f")).outputs[0].value == 1
    remote.close()
    server.close()


def serve(answers, *, piece=1 << 20, pause=0.0):
    """A server that says what it is told: status and body for each POST in turn, the last one for ever; so many bytes at a time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._say(200, b'{"protocol": 1, "report": "x"}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(*(answers.pop(0) if len(answers) > 1 else answers[0]))

        def _say(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for start in range(0, len(body), piece):
                time.sleep(pause)
                self.wfile.write(body[start : start + piece])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


GOOD = json.dumps({"outcomes": [{"failed": None, "outputs": [{"data": "1", "text": "", "error": None}]}]}).encode()


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(500, b"{}")], "500"), ([(200, b"no json")], "JSON"), ([(200, b"{}")], "outcomes"), ([(503, b"")], "503"),
        ([(200, b'{"outcomes": [{"failed": null, "outputs": []}]}')], "0 outputs for 1"), ([(200, b" " * 10_000_000)], "more than"),
        ([(200, b'{"outcomes": [{"failed": "full"}]}')], "full"),
        ([(200, b'{"outcomes": [{"failed": null, "outputs": [{"data": "x", "text": "", "error": null}]}]}')], "JSON"),
    ],
)  # fmt: skip
def test_a_server_that_fails_is_a_failure_and_no_score(answers, says):
    server = serve(answers)
    remote = Remote(f"http://127.0.0.1:{server.server_address[1]}", attempts=2)
    outcome = remote.run(Program("x", [[]], "f"))
    assert says in outcome.failed
    remote.close()
    server.shutdown()
    server.server_close()


@pytest.mark.timed
def test_a_server_that_dribbles_is_given_up(monkeypatch):
    """Each byte comes in time, and all of them would take minutes."""
    monkeypatch.setattr("coterie.sandbox.remote._WAIT", 0.3)
    server = serve([(200, b" " * 2000 + GOOD)], piece=30, pause=0.1)
    remote = Remote(f"http://127.0.0.1:{server.server_address[1]}", attempts=1)
    began = time.monotonic()
    outcome = remote.run(Program("x", [[]], "f", Limits(wall_seconds=0.2)))
    assert "took longer than 0.5 s" in outcome.failed
    assert time.monotonic() - began < 3
    remote.close()
    server.shutdown()
    server.server_close()


def test_a_busy_server_is_asked_again():
    server = serve([(503, b""), (200, GOOD)])
    remote = Remote(f"http://127.0.0.1:{server.server_address[1]}")
    assert remote.run(Program("x", [[]], "f")).outputs[0].value == 1
    remote.close()
    server.shutdown()
    server.server_close()
