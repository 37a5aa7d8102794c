"""A scoring service that misbehaves on purpose: what the HTTP scorer is tested against.

    python scripts/faulty_service.py --port 8123         answers, with faults
    python scripts/faulty_service.py --port 8123 --sane  answers, without

POST / with {"texts": [...]} is answered by {"scores": [...]}; the score of a text is a function of
its letters. Of all requests 20 % get 429 with Retry-After, 10 % 500, 5 % no answer in time, 5 %
JSON that was cut, 2 % a list that is too short, 2 % NaN, 2 % a connection that is dropped. Which
ones is drawn from the seed, so two runs of the same requests in the same order agree.
"""

import argparse
import json
import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = {
    "429": 0.20,
    "500": 0.10,
    "timeout": 0.05,
    "malformed": 0.05,
    "short": 0.02,
    "nan": 0.02,
    "dropped": 0.02,
}


def truth(text: str) -> float:
    """The score of a text: the share of its characters that are vowels."""
    return sum(letter in "aeiou" for letter in text.lower()) / max(len(text), 1)


class FaultyService:
    """The service on a port of this machine, in threads of its own.

    with FaultyService() as service:
        ask(service.url)
    """

    def __init__(
        self,
        port: int = 0,
        *,
        faulty: bool = True,
        latency: float = 0.02,
        hang: float = 2.0,
        seed: int = 0,
    ) -> None:
        """Listen.

        Args:
            port: 0 takes a free one.
            faulty: false always answers well.
            latency: seconds that a good answer takes.
            hang: seconds that an answer which comes too late takes.
            seed: of the faults.
        """
        self.seen: Counter[str] = Counter()
        """Requests by what was done with them."""
        self.headers: list[dict[str, str]] = []
        self.texts = 0
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        service = self

        self._open: set[socket.socket] = set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                service._open.add(self.connection)

            def finish(self) -> None:
                service._open.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def do_POST(self) -> None:
                size = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(size))
                service.answer(self, body, faulty=faulty, latency=latency, hang=hang)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            request_queue_size = 128
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "FaultyService":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):  # connections that were kept alive
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(
        self,
        handler: BaseHTTPRequestHandler,
        body: Any,
        *,
        faulty: bool,
        latency: float,
        hang: float,
    ) -> None:
        """Answer one request, well or not."""
        with self._lock:
            fault = self._fault() if faulty else "well"
            self.seen[fault] += 1
            self.texts += len(body["texts"])
            self.headers.append(dict(handler.headers.items()))
        scores = [truth(text) for text in body["texts"]]
        match fault:
            case "429":
                _send(handler, 429, "{}", {"Retry-After": "0.05"})
            case "500":
                _send(handler, 500, "<html>Internal Server Error</html>")
            case "timeout":
                time.sleep(hang)
                handler.close_connection = True
            case "malformed":
                _send(handler, 200, json.dumps({"scores": scores})[:-4])
            case "short":
                _send(handler, 200, json.dumps({"scores": scores[:-1]}))
            case "nan":
                _send(handler, 200, json.dumps({"scores": [float("nan"), *scores[1:]]}))
            case "dropped":
                handler.close_connection = True
            case _:
                time.sleep(latency)
                _send(handler, 200, json.dumps({"scores": scores}))

    def _fault(self) -> str:
        drawn = self._draw.random()
        for name, share in FAULTS.items():
            if drawn < share:
                return name
            drawn -= share
        return "well"


def _send(
    handler: BaseHTTPRequestHandler, code: int, text: str, headers: dict[str, str] | None = None
) -> None:
    data = text.encode()
    handler.send_response(code)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--sane", action="store_true")
    parser.add_argument("--latency", type=float, default=0.02)
    options = parser.parse_args()
    with FaultyService(options.port, faulty=not options.sane, latency=options.latency) as service:
        print(f"listening on {service.url}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
