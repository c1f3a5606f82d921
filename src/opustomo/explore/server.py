"""``opustomo explore``: a server for this machine and its page.

Owns: the verb, the link with its token, and how a request becomes an answer.  Only the standard library is needed, and
nothing outside the machine is reached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from opustomo.config import ExploreConfig
from opustomo.errors import Interrupted, UserError
from opustomo.explore.answers import GET, POST, Desk, Reply, as_json
from opustomo.explore.gate import HEADERS, LOOPBACK, Refused, admit, body_size, cookie_name, split

log = logging.getLogger(__name__)

PORT, TRIED = 8642, 20
AT_ONCE = 64  # connections
PATIENCE = 30.0  # seconds that a connection may say nothing
KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8",
         "txt": "text/plain; charset=utf-8", "svg": "image/svg+xml"}  # fmt: skip


def main(config: ExploreConfig) -> int:
    """Verb ``explore``: serve until Ctrl-C."""
    server = open_server(config.runs, config.port)
    link = f"http://{LOOPBACK}:{server.server_port}/?token={server.token}"
    here = socket.gethostname()
    print(f"opustomo explore: {', '.join(str(run) for run in config.runs)}\n\n  {link}\n\n"
          f"from another machine: ssh -L {server.server_port}:{LOOPBACK}:{server.server_port} {here}, and open the "
          "same link there.\nThe link lets in whoever has it; Ctrl-C ends it.", flush=True)  # fmt: skip
    for desk in server.desks:
        threading.Thread(target=desk.warm, daemon=True).start()
    with _browser(link, not config.no_browser and _has_screen()):
        return serve(server)


def open_server(runs: Sequence[Path], port: int = 0) -> Server:
    """A server of these runs on 127.0.0.1.  UserError: no run, the same one twice, no such port or one in use."""
    for i, run in enumerate(runs):
        if not (run / "config.yaml").is_file() and not (run / "run.log").is_file():
            raise UserError(f"{run}: no run here; give the folder that `train -o` or `linear -o` wrote")
        if run.resolve() in [other.resolve() for other in runs[:i]]:
            raise UserError(f"{run}: is given twice; give every run once")
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port {port}: is no port; give 1024 to 65535, or leave it out")
    desks = [Desk(run) for run in runs]
    for tried in [port] if port else [*range(PORT, PORT + TRIED), 0]:
        try:
            return Server(tried, desks)
        except OSError as error:
            reason = error.strerror
    raise UserError(f"--port {port}: cannot be had ({reason}); give another one, or leave it out")


def serve(server: Server) -> int:
    """Answer until Ctrl-C, which is how it ends: status 0."""
    try:
        server.serve_forever()
    except Interrupted as asked:
        if asked.number != signal.SIGINT:
            raise
    finally:
        server.server_close()
        for desk in server.desks:
            desk.close()
    print("\nended", flush=True)
    return 0


def _has_screen() -> bool:
    """Whether a browser could show anything here."""
    there = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(there) and "SSH_CONNECTION" not in os.environ


@contextlib.contextmanager
def _browser(link: str, wanted: bool) -> Iterator[None]:
    """Open the link by way of a file that only its owner can read: the words of a command are for all to see."""
    with contextlib.ExitStack() as stack:
        if wanted:
            file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".html"))
            file.write(f'<meta http-equiv="refresh" content="0; url={link}"><title>opustomo explore</title>')
            file.flush()
            threading.Thread(target=webbrowser.open, args=[Path(file.name).as_uri()], daemon=True).start()
        yield


def _pages() -> dict[str, Reply]:
    """What is served besides answers, by address: nothing else can be asked for."""
    found = {}
    for folder in ("page", "vendor"):
        for path in resources.files(__package__).joinpath(folder).iterdir():
            kind = KINDS.get(path.name.rpartition(".")[2])
            if kind is not None:
                found[f"/{path.name}"] = Reply(path.read_bytes(), kind)
    return found | {"/": found["/index.html"], "/favicon.ico": found["/icon.svg"]}


class Server(ThreadingHTTPServer):
    """On the loopback device, with a limit to the connections at once."""

    daemon_threads = True
    request_queue_size = AT_ONCE

    def __init__(self, port: int, desks: Sequence[Desk], token: str | None = None) -> None:
        self.desks, self.token, self.pages = list(desks), token or secrets.token_urlsafe(24), _pages()
        self._free = threading.BoundedSemaphore(AT_ONCE)
        super().__init__((LOOPBACK, port), Handler)

    def server_bind(self) -> None:
        """Without looking up the machine's name, which may ask a name server."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = LOOPBACK, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own; who comes when all are taken is sent away."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off is nothing to tell."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a request failed")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def version_string(self) -> str:
        """Nothing about versions."""
        return "opustomo"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses may hold the token."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself: a line that is no request, an unknown method."""
        code = 405 if code == 501 else code
        self.close_connection, self.request_version = True, self.protocol_version  # it may have been no request at all
        self._send(code, as_json({"error": message or "not understood"}))

    def do_GET(self) -> None:
        """Answer."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Answer."""
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            status, reply = 200, self._reply(method)
        except Refused as refused:
            status, reply = refused.status, as_json({"error": str(refused)})
        except UserError as error:
            status, reply = 400, as_json({"error": str(error)})
        except TimeoutError:
            self.close_connection = True
            return
        except OSError as error:
            status, reply = 500, as_json({"error": f"the machine failed: {error.strerror}"})
        except Exception as error:
            log.exception("%s %s", method, self.path.partition("?")[0])
            status, reply = 500, as_json({"error": f"internal error: {type(error).__name__}; the terminal tells more"})
        if status >= 400:
            self.close_connection = True  # a body may have been left unread
        self._send(status, reply)

    def _reply(self, method: str) -> Reply:
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = dict(parse_qsl(split(self.path).query, keep_blank_values=True, max_num_fields=20, errors="replace"))
        path = admit(method, self.path, headers, self.server.token, query.get("token", "")).path
        if method == "GET" and path in self.server.pages:
            return self.server.pages[path]
        if (method, path) == ("GET", "/api/runs"):
            return as_json([str(desk.path) for desk in self.server.desks])
        desk, name = self._desk(path)
        if method == "GET" and name in GET:
            return GET[name](desk, query)
        if method == "POST" and name in POST:
            function, most = POST[name]
            return function(desk, query, self.rfile.read(body_size(headers, most)))
        raise Refused(405 if name in GET or name in POST else 404, "there is nothing at this address")

    def _desk(self, path: str) -> tuple[Desk, str]:
        """The run that /api/N/NAME is about, and NAME."""
        parts = path.split("/")
        if len(parts) != 4 or parts[:2] != ["", "api"] or not (parts[2].isdigit() and len(parts[2]) < 4):
            raise Refused(404, "there is nothing at this address")
        if int(parts[2]) >= len(self.server.desks):
            raise Refused(404, f"there are runs 0 to {len(self.server.desks) - 1}")
        return self.server.desks[int(parts[2])], parts[3]

    def _send(self, status: int, reply: Reply) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        if reply.name:
            self.send_header("Content-Disposition", f"attachment; filename={json.dumps(reply.name)}")
        if status == 200 and getattr(self, "path", "").startswith("/?"):
            token = self.server.token
            self.send_header("Set-Cookie", f"{cookie_name(token)}={token}; Path=/; HttpOnly; SameSite=Strict")
        if status >= 400:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
