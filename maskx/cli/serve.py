r"""Open a local page to try a trained run: drop a photograph, see its masks.

An annotation file that is dropped with it shows its objects too. Those that have a box and no mask
are dashed; a click gives them one, and the download has both.

The page is for this machine alone unless --host says otherwise. It needs the extra `serve`:
pip install 'maskx-detectron2[serve]'.

Examples:
    maskx serve output/quickstart-maskx
    maskx serve output/animals --port 9000 --open
"""

import argparse
import contextlib
import errno
import io
import ipaddress
import math
import socket
from pathlib import Path

_LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="run folder of a training")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--open", action="store_true", help="open the page in a browser")
    skip = "mend what is bad in an annotation file or leave it out, counted, instead of refusing it"
    add("--skip-bad", action="store_true", help=skip)
    add("--max-megabytes", type=float, default=20, help="of a file (default: 20)")
    add("--max-megapixels", type=float, default=50, help="of an image (default: 50)")


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    try:
        from werkzeug.serving import make_server

        from maskx.cli.web.app import make_app
    except ImportError as error:
        raise ImportError(
            "maskx serve needs Flask. Install it with: pip install 'maskx-detectron2[serve]'"
        ) from error
    import maskx

    if not 0 <= args.port < 2**16:
        raise ValueError(f"--port is {args.port}. Allowed: 0, for a free one, to {2**16 - 1}.")
    for name in ("max_megabytes", "max_megapixels"):
        if not 0 < getattr(args, name) < math.inf:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(args, name)}. Allowed: a number above 0.")
    predictor = maskx.open_run(args.run_folder, device=args.device)
    try:
        hosts = _allowed_hosts(args.host)
        app = make_app(
            predictor,
            args.run_folder,
            max_bytes=int(args.max_megabytes * 2**20),
            max_pixels=int(args.max_megapixels * 1e6),
            strict=not args.skip_bad,
            hosts=hosts,
        )
        with contextlib.redirect_stderr(io.StringIO()):  # where it says a part of the reason
            server = make_server(args.host, args.port, app, threaded=True)
    except (OSError, SystemExit) as error:
        raise ValueError(_why_not(error, args.host, args.port)) from error
    host = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{host}:{server.server_port}/"
    print(f"{predictor.system.title} is on {url}   Ctrl-C ends it.", flush=True)
    if hosts is None:
        print("Whoever reaches this address can use the model; there is no password.", flush=True)
    if args.open:
        import webbrowser

        if not webbrowser.open(url):
            print(f"No browser was found. Open {url} yourself.", flush=True)
    server.serve_forever()


def _allowed_hosts(host: str) -> set[str] | None:
    """Return the names under which the page may be asked for; None, which is any, on a network."""
    address = socket.getaddrinfo(host, None)[0][4][0]
    return {*_LOCAL, host.lower()} if ipaddress.ip_address(address).is_loopback else None


def _why_not(error: BaseException, host: str, port: int) -> str:
    # The server turns what it cannot do into an exit.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, OSError) and cause.errno != errno.EADDRINUSE:
        return (
            f"--host {host} --port {port} cannot be listened on: {cause.strerror or cause}. Give "
            "the name or an address of this machine, and a port that you may use (from 1024 on)."
        )
    return f"--port {port} is in use. Give another one, or --port 0 for a free one."
