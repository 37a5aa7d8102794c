"""`cft serve`: a run as a web page."""

import ipaddress
import secrets
import socket
import webbrowser
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from constrained_ft.serve.access import Rules

__all__ = ["serve"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_CONNECTIONS = 64  # at once; more are refused before they are read
_SECONDS_TO_END = 5  # for answers that are under way


def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Where to listen; beyond this machine only those who know a token are let in.",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Also open the page in a browser.")
    ] = False,
) -> None:
    """Explore a run in the browser: three models answer side by side, coloured by the evidence.

    The base model, the tuned one, and the tuned one guided by R, as strongly as a slider says.
    """
    from constrained_ft.cli.display import make_display

    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ModelError(
            f"cft serve needs starlette and uvicorn: pip install 'constrained-ft[serve]' ({error})"
        ) from error
    listener = _listen(host, port)
    settings.prepare_libraries()
    with make_display(settings.console(stderr=True), quiet=settings.quiet) as display:
        from constrained_ft.serve.app import application
        from constrained_ft.serve.explorer import load_explorer

        explorer = load_explorer(run, display)
    rules, url = _rules(listener, host)

    def stopping() -> bool:
        return server.should_exit

    server = uvicorn.Server(
        uvicorn.Config(
            application(explorer, rules, stopping),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
    )
    console = settings.console()
    console.print(url, markup=False, soft_wrap=True)
    if not settings.quiet:
        console.print("Ctrl-C ends it", style="dim")
    if rules.token is not None:
        settings.console(stderr=True).print(
            "note: whoever knows the address may ask, and what is said travels unencrypted; "
            "a tunnel (ssh -L) to a server on 127.0.0.1 does without both",
            soft_wrap=True,
        )
    if open_browser:
        webbrowser.open(url)
    # The server ends at the first signal and raises it again when it is done.
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; before anything is loaded, for it may be taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on --host {host} --port {port}: {error.strerror}; choose another port "
            "(0 takes a free one), or an address of this machine"
        ) from error


def _rules(listener: socket.socket, host: str) -> "tuple[Rules, str]":
    """Who may ask, and the address to open."""
    from constrained_ft.serve.access import Rules

    address, port = listener.getsockname()[:2]
    bound = ipaddress.ip_address(address)
    if bound.is_loopback:
        return Rules(names=_LOOPBACK), f"http://{_in_url(address)}:{port}/"
    token = secrets.token_urlsafe(32)
    names = frozenset({socket.gethostname().lower(), host.lower(), *_LOOPBACK})
    rules = Rules(names=names, any_address=True, token=token, cookie=f"cft_{port}")
    name = socket.gethostname() if bound.is_unspecified else _in_url(host)
    return rules, f"http://{name}:{port}/?token={token}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
