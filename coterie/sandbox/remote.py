"""A sandbox on another machine: the client, and a small server for people to run themselves.

Protocol, version 1. `GET /` answers {"protocol": 1, "report": "..."}. `POST /run` takes {"programs": [{"source", "inputs", "function",
"limits": {"seconds", "memory_megabytes", "output_bytes", "wall_seconds"}}, ...]} and answers {"outcomes": [{"outputs": [{"data",
"text", "error"}, ...], "failed"}, ...]}, as base.py says of each. What is expected is never sent. With a token, every request has
the header `Authorization: Bearer TOKEN`; a server gives the programs that it is sent no more than its own sandbox does.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import random
import threading
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from coterie.deadline import running
from coterie.redact import conceal
from coterie.sandbox.base import (
    TOKEN_VARIABLE,
    Limits,
    Outcome,
    Output,
    Program,
    Sandbox,
    SandboxError,
)
from coterie.sandbox.make import make_sandbox

PROTOCOL = 1
_MAX_REQUEST = 100_000_000  # bytes
_SPARE = 4  # an answer's bytes for each byte of output: escapes
_OVERHEAD = 1000  # its bytes for each input beside
_WAIT = 60.0  # seconds in which a server must find time for a program, beside the program's own


class Remote(Sandbox):
    """Programs run by a server that speaks the protocol. What that server holds is its owner's affair."""

    def __init__(self, url: str, *, num_workers: int | None = None, attempts: int = 3) -> None:
        """Raises SandboxError where nobody answers there, or not in this protocol."""
        super().__init__(num_workers or 16)
        token = os.environ.get(TOKEN_VARIABLE)
        conceal(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=30.0)
        self._attempts = attempts
        try:
            hello = self._client.get("/").raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            self.close()
            raise SandboxError(f"no sandbox server answers at {url}: {error}") from error
        if not isinstance(hello, dict) or hello.get("protocol") != PROTOCOL:
            self.close()
            raise SandboxError(f"{url} does not speak protocol {PROTOCOL}")
        self.report = f"http: {url}: {str(hello.get('report'))[:200]}"

    def run(self, program: Program) -> Outcome:
        """One request, tried again where the connection fails."""
        failure: Exception | None = None
        for attempt in range(self._attempts):
            time.sleep(min(5.0, 0.1 * 2**attempt + random.random()) if attempt else 0.0)
            try:
                return self._ask(program)
            except (httpx.HTTPError, ValueError, TypeError, KeyError, RecursionError) as error:
                failure = error
                if not isinstance(error, httpx.TransportError):
                    break
        return Outcome(failed=f"the sandbox server: {type(failure).__name__}: {failure}"[:300])

    def _ask(self, program: Program) -> Outcome:
        body = {"programs": [asdict(program)]}
        most = _SPARE * program.limits.output_bytes + _OVERHEAD * (1 + len(program.inputs))
        data = bytearray()
        seconds = program.limits.wall + _WAIT
        deadline = running() + seconds  # httpx's own limit starts anew with each byte
        with self._client.stream("POST", "/run", json=body, timeout=seconds) as answer:
            if answer.status_code in (429, 502, 503, 504):
                raise httpx.TransportError(f"the server is busy: status {answer.status_code}")
            answer.raise_for_status()
            for chunk in answer.iter_bytes():
                data += chunk
                if running() > deadline:
                    raise httpx.ReadTimeout(f"it took longer than {seconds:g} s")
                if len(data) > most:
                    raise ValueError(f"it answered more than {most} bytes")
        (one,) = json.loads(data)["outcomes"]
        return _read_outcome(one, len(program.inputs))

    def close(self) -> None:
        super().close()
        self._client.close()


def _read_outcome(one: dict[str, Any], num_inputs: int) -> Outcome:
    if one["failed"] is not None:
        return Outcome(failed=str(one["failed"])[:300])
    outputs = tuple(
        Output(
            _json(output["data"]), str(output["text"]), None if output["error"] is None else str(output["error"])[:300]
        )
        for output in one["outputs"]
    )
    if len(outputs) != num_inputs:
        raise ValueError(f"it answered {len(outputs)} outputs for {num_inputs} inputs")
    return Outcome(outputs)


def _json(text: str) -> str:
    json.loads(text)  # raises where it is none
    return text


class SandboxServer:
    """Serves a sandbox over HTTP, from threads of this process. `url` is where it listens; port 0 takes a free one."""

    def __init__(self, sandbox: Sandbox, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        self._server = ThreadingHTTPServer((host, port), _make_handler(sandbox, token))
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until somebody closes it."""
        self._thread.join()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _make_handler(sandbox: Sandbox, token: str | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 120

        def do_GET(self) -> None:
            self._answer(*((200, {"protocol": PROTOCOL, "report": sandbox.report}) if self._known() else _UNKNOWN))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if not self._known() or self.path != "/run" or not 0 < length <= _MAX_REQUEST:
                self.close_connection = True
                self._answer(*(_UNKNOWN if not self._known() else (400, {"error": "POST /run with a body"})))
                return
            try:
                asked = json.loads(self.rfile.read(length))["programs"]
                programs = [Program(**{**one, "limits": Limits(**one["limits"])}) for one in asked]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                self._answer(400, {"error": f"{type(error).__name__}: {error}"})
                return
            self._answer(200, {"outcomes": [asdict(outcome) for outcome in sandbox.run_all(programs)]})

        def _known(self) -> bool:
            given = self.headers.get("Authorization", "")
            return token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode())

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *_: Any) -> None:
            pass

    return Handler


_UNKNOWN = (401, {"error": "a token is needed"})


def main() -> None:
    """`python -m coterie.sandbox.remote --port 8070`: serve this machine's sandbox."""
    parser = argparse.ArgumentParser(
        description=f"Serve this machine's sandbox. The environment's {TOKEN_VARIABLE} is the token."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8070)
    parser.add_argument("--sandbox", default="auto", help="auto, bubblewrap or landlock")
    given = parser.parse_args()
    sandbox = make_sandbox(given.sandbox)
    server = SandboxServer(sandbox, host=given.host, port=given.port, token=os.environ.get(TOKEN_VARIABLE))
    print(f"{sandbox.report}\nlistening at {server.url}", flush=True)
    server.wait()


if __name__ == "__main__":
    main()
