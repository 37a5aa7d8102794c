"""One of the processes that torchrun starts; `launch` hands it its orders as JSON.

What ends a run on purpose (done, a wrong setting, a guard, a signal) goes to `status.json`, and the
worker leaves with code 0, so that torchrun starts nothing again; the launcher returns the code
that is written there. A crash leaves with another code: with `--max-restarts N`, all processes
start again, and they continue from the newest checkpoint.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from constrained_ft.cli.outcome import record
from constrained_ft.cli.settings import settings
from constrained_ft.errors import CftError, PeerError, storage_error
from constrained_ft.progress import Silent

if TYPE_CHECKING:
    from constrained_ft.distributed import World

__all__ = ["Orders", "RankRecord", "attempt_folder", "records"]

_ON_PURPOSE = (0, 2, 3, 4, 75)  # codes of ends that another start would not change
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a worker is told."""

    folder: str
    attempt: int
    quiet: bool
    verbose: bool
    color: bool
    debug: bool

    def text(self) -> str:
        """As an argument of a command line."""
        return json.dumps(asdict(self))


@dataclass(kw_only=True)
class RankRecord:
    """Who a rank is, what it does, and how it ended: a file that others read when it is gone."""

    rank: int
    pid: int
    host: str
    doing: str = "starting"
    ended: int | None = None
    missed: str | None = None
    """What it says of another rank that did not come."""

    def write(self, folder: Path) -> None:
        """Replace the file."""
        from constrained_ft.run_folder import write_atomically

        write_atomically(folder / f"rank_{self.rank}.json", json.dumps(asdict(self)), durable=False)


def attempt_folder(folder: Path, attempt: int) -> Path:
    """Logs and records of all ranks, of one start."""
    return folder / "logs" / f"attempt_{attempt}"


def records(folder: Path) -> list[RankRecord]:
    """Of all ranks that have begun, by rank."""
    found = []
    for file in folder.glob("rank_*.json"):
        try:
            found.append(RankRecord(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue  # just being written
    return sorted(found, key=lambda one: one.rank)


def main(text: str) -> int:
    """Run one rank; returns its exit code."""
    faulthandler.enable()
    _leave_with_parent()
    orders = Orders(**json.loads(text))
    settings.quiet, settings.verbose = orders.quiet, orders.verbose
    settings.color, settings.debug = orders.color, orders.debug
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    orders = replace(orders, attempt=orders.attempt + restarts)
    rank, logs = int(os.environ["RANK"]), attempt_folder(Path(orders.folder), orders.attempt)
    logs.mkdir(parents=True, exist_ok=True)
    _redirect(logs / f"rank_{rank}.log", (1, 2) if rank > 0 else (2,))
    settings.prepare_libraries()
    own = RankRecord(rank=rank, pid=os.getpid(), host=socket.gethostname())
    code = _run(orders, own, logs)
    own.ended = code
    with suppress(OSError):
        own.write(logs)
    return 0 if code in _ON_PURPOSE else code


def _run(orders: Orders, own: RankRecord, logs: Path) -> int:
    from constrained_ft.cli.display import Several, logged_display
    from constrained_ft.distributed import StopRequest, World, join
    from constrained_ft.run_folder import RunFolder
    from constrained_ft.trackers import tracked
    from constrained_ft.train import train

    stop = StopRequest()
    stop.install()
    own.write(logs)
    folder = RunFolder(Path(orders.folder))
    world: World | None = None
    try:
        config = folder.config()
        world = join(stop, config.placement.timeout, config.placement.silence)
        if world.leads:
            folder.write_status("running", attempt=orders.attempt)
        console = settings.console()
        with (
            logged_display(console, logs, own.rank, quiet=settings.quiet) as display,
            tracked(config, folder, display, leads=world.leads) as tracker,
        ):
            recording = _Recording(own, logs, world)
            train(config, folder, Several(display, recording, tracker), stop, world)
        if world.leads:
            folder.write_status("finished", exit_code=0)
        return 0
    except BaseException as raised:
        error = storage_error(raised) or raised
        if world is not None:
            world.announce(error)
        own.missed = str(error) if isinstance(error, PeerError) else None
        if own.rank == 0:
            record(folder, error)
        traceback.print_exception(raised)  # to the rank's log
        return error.exit_code if isinstance(error, CftError) else 1
    finally:
        if world is not None:
            world.leave()


class _Recording(Silent):
    """A display that keeps a rank's record."""

    def __init__(self, own: RankRecord, logs: Path, world: "World") -> None:
        self._own, self._logs, self._world = own, logs, world

    def phase(self, name: str, total: int) -> None:
        """Write down what begins."""
        self._own.doing = name
        self._own.write(self._logs)
        self._world.begin(name)


def _redirect(log: Path, streams: Sequence[int]) -> None:
    """What this process prints, libraries included, goes to a file; the first rank draws."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in streams:
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _leave_with_parent() -> None:
    """End when torchrun is gone: nobody would stop this process any more, or hold the lock."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    ended = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # An exchange with a frozen rank may still stand open, and Python would wait for its thread.
    os._exit(ended)
