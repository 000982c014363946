"""Open optuna-dashboard on a study, read-only: its trials as they come, and all of Optuna's plots.

Only this machine is served (over SSH: ssh -L 8080:localhost:8080 HOST). Works while the study runs; press Ctrl-C to end it."""

import argparse
import json
import re
import socketserver
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from loratune.cli.parser import add_no_browser, open_browser
from loratune.errors import LoratuneError, MissingExtraError

if TYPE_CHECKING:
    from loratune.record import StudyRecord

HOST, PORT = "127.0.0.1", 8080
_HERE = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # whatever the port: an SSH tunnel changes it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="STUDY", help="the study's folder")
    parser.add_argument("--storage", metavar="URL", help="the study's storage, if its password was not kept (default: from the study)")
    parser.add_argument("--port", type=int, metavar="N", help=f"default: {PORT}, or any free one")
    add_no_browser(parser)


def main(args: argparse.Namespace) -> int:
    from loratune.record import read

    with dashboard_server(read(Path(args.folder)), args.port, args.storage) as server:
        address = f"http://{HOST}:{server.server_port}{server.page}"
        print(f"Dashboard at {address}\nThe study is read-only here. Press Ctrl-C to end it.", flush=True)
        open_browser(args, address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """Threads, for a browser holds connections open."""

    daemon_threads = True
    page = "/dashboard"  # of the study


def dashboard_server(record: "StudyRecord", port: int | None, url: str | None = None) -> Server:
    """A listening server of the study's dashboard. Raises MissingExtraError, StorageError, and LoratuneError for a port that is taken."""
    try:
        from optuna_dashboard import wsgi
    except ImportError as error:
        raise MissingExtraError("optuna-dashboard", "dashboard", str(error)) from error
    from loratune.cli.dashboard_values import with_real_values
    from loratune.record.storage import open_to_read

    storage, number = open_to_read(url=url or record.spec.get("storage"), folder=record.folder, name=record.name)
    storage = with_real_values(storage, record.spec)
    problem = ""
    for wanted in (PORT, 0) if port is None else (port,):
        try:
            server: Server = make_server(HOST, wanted, guarded(wsgi(storage)), server_class=Server, handler_class=_Quiet)
        except (OSError, OverflowError) as error:
            problem = str(getattr(error, "strerror", None) or error)
            continue
        server.page = f"/dashboard/studies/{number}"
        return server
    raise LoratuneError(f"cannot listen on port {port}: {problem}. Choose another --port.")


def guarded(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The WSGI application, read-only and for this machine.

    The dashboard can delete and rename studies and finish trials, which the study could not go on after. A Host header that does not
    name this machine comes from a web site that resolves its own name to 127.0.0.1 (DNS rebinding).
    """

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not re.fullmatch(_HERE, environ.get("HTTP_HOST", ""), re.IGNORECASE):
            reason = "The Host header does not name this machine: open the page as http://localhost or http://127.0.0.1."
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            reason = "loratune serves the dashboard read-only, so that the study can continue unchanged."
        else:
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/json")])
        return [json.dumps({"reason": reason}).encode()]

    return application


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass
