"""Start a run's processes through torchrun, pass signals on to them, and say how they ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from constrained_ft.cli.settings import settings
from constrained_ft.cli.worker import Orders, RankRecord, attempt_folder, records
from constrained_ft.errors import CftError, ConfigError, Interrupted, PeerError

if TYPE_CHECKING:
    from constrained_ft.config import Config
    from constrained_ft.run_folder import RunFolder

__all__ = ["Processes", "run_processes", "wait_for_run"]

_FIRST_MACHINE_SECONDS = 600.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many processes, where, and what else torchrun is told."""

    per_node: int
    nodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Processes on all machines."""
        return self.per_node * self.nodes

    def check(self, config: "Config") -> None:
        """See that a configuration can run in so many processes.

        Raises:
            ConfigError: if peers would leave none to update the LLM, or TRL's trainers would be
                several.
        """
        if config.trainer.trl is not None and self.total > 1:
            raise ConfigError(
                f"trainer.trl runs in one process, and {self.total} would start; give "
                "--nproc-per-node 1"
            )
        peers = config.placement.peers
        if config.placement.kind == "peers" and peers >= self.total:
            raise ConfigError(
                f"placement.peers={peers} needs {peers + 1} processes or more, and "
                f"{self.total} would start; give --nproc-per-node {peers + 1}, or placement=inline"
            )

    def machines(self) -> list[str]:
        """The options that say which machines, for a child process."""
        if self.endpoint is None:
            return []
        return [
            *("--nnodes", str(self.nodes), "--node-rank", str(self.node_rank)),
            *("--rdzv-endpoint", self.endpoint),
        ]

    def command(self, orders: Orders) -> list[str]:
        """The whole command line."""
        if self.endpoint is None:
            meeting = ["--standalone"]  # a port of its own: two runs never meet
        else:
            meeting = [
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint),
                *("--nnodes", str(self.nodes), "--node-rank", str(self.node_rank)),
            ]
        return [
            *(sys.executable, "-m", "torch.distributed.run", *meeting),
            *("--nproc-per-node", str(self.per_node), *self.extra),
            *("-m", "constrained_ft.cli.worker", orders.text()),
        ]


def wait_for_run(folder: "RunFolder", processes: Processes) -> None:
    """Start this machine's processes once the first machine has begun the run.

    Raises:
        PeerError: when it does not begin.
    """
    begun = time.monotonic()
    while folder.status().get("state") != "running":
        if time.monotonic() - begun > _FIRST_MACHINE_SECONDS:
            raise PeerError(f"the first machine has begun no run in {folder.path}")
        time.sleep(1)
    _run_torchrun(folder, processes, ())


def run_processes(folder: "RunFolder", processes: Processes) -> None:
    """Train in several processes.

    Raises:
        CftError: what ended the run, as the workers wrote it to `status.json`.
        PeerError: naming the rank that died, and what it was doing.
    """
    attempt = int(folder.status().get("attempt", 1))
    # The lock is held until torchrun ends, even if this process is killed.
    code, said, received = _run_torchrun(folder, processes, folder.lock_descriptors())
    _conclude(folder, attempt, code, said, received)


def _run_torchrun(
    folder: "RunFolder", processes: Processes, descriptors: tuple[int, ...]
) -> tuple[int, str, int | None]:
    """Its exit code, what it said on standard error, and the signal that came meanwhile."""
    attempt = int(folder.status().get("attempt", 1))
    orders = Orders(
        folder=str(folder.path.resolve()),
        attempt=attempt,
        quiet=settings.quiet,
        verbose=settings.verbose,
        color=settings.color,
        debug=settings.debug,
    )
    # Of several processes on one machine, each takes its part of the cores.
    threads = str(max(1, (os.cpu_count() or 1) // processes.per_node))
    child = subprocess.Popen(
        processes.command(orders),
        env={"OMP_NUM_THREADS": threads} | dict(os.environ),
        pass_fds=descriptors,
        start_new_session=True,  # Ctrl-C reaches it through this process alone
        stderr=None if settings.verbose else subprocess.PIPE,
        text=True,
    )
    signalled = _Forwarding(child, folder.path, attempt, processes.per_node)
    with child, signalled:
        _, said = child.communicate()
    return child.returncode, said or "", signalled.received


class _Forwarding:
    """While it lasts, signals go to the workers; a second one kills everything."""

    def __init__(
        self, child: subprocess.Popen[str], folder: Path, attempt: int, count: int
    ) -> None:
        self._child, self._folder = child, folder
        self._attempt, self._count = attempt, count
        self._before: dict[int, object] = {}
        self.received: int | None = None

    def __enter__(self) -> None:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal.signal gave it

    def _receive(self, number: int, frame: FrameType | None) -> None:
        workers = [
            one
            for one in _newest_records(self._folder, self._attempt)
            if one.ended is None and one.host == socket.gethostname()
        ]
        if self.received is not None:
            for pid in (*(one.pid for one in workers), self._child.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(130)
        self.received = number
        settings.warn("stopping at the next safe point; again to leave at once")
        if len(workers) < self._count:  # not all have begun: there is nothing to lose yet
            self._child.send_signal(signal.SIGTERM)
            return
        for one in workers:
            with suppress(ProcessLookupError):
                os.kill(one.pid, number)


def _newest_records(folder: Path, attempt: int) -> list[RankRecord]:
    """Those of the newest start: torchrun may have started the workers again."""
    while attempt_folder(folder, attempt + 1).exists():
        attempt += 1
    return records(attempt_folder(folder, attempt))


def _conclude(
    folder: "RunFolder", attempt: int, code: int, said: str, received: int | None
) -> None:
    """Raise what ended the run, if it did not finish."""
    status = folder.status()
    dead = [one for one in _newest_records(folder.path, attempt) if one.ended is None]
    if dead and received is None:
        words = [f"rank {one.rank} (process {one.pid}) died while {one.doing}" for one in dead]
        reason = f"{'; '.join(words)}; logs are in {folder.path / 'logs'}"
        folder.write_status("failed", reason=reason, exit_code=PeerError.exit_code)
        raise PeerError(f"{reason}; `cft train --resume {folder.path}` continues")
    if status["state"] == "finished":
        return
    if status["state"] == "running" and received is not None:
        name = signal.Signals(received).name
        reason = f"stopped by {name} before training began"
        folder.write_status("interrupted", reason=reason, exit_code=Interrupted.exit_code)
        raise Interrupted(f"{reason}; `cft train --resume {folder.path}` continues")
    if status["state"] == "running":
        reason = _last_line(said) or f"torchrun ended with code {code}"
        folder.write_status("failed", reason=reason, exit_code=1)
        raise PeerError(reason)
    again = f"; `cft train --resume {folder.path}` continues"
    reason = str(status["reason"])
    raise _Ended(
        reason + (again if status["state"] == "interrupted" else ""), int(status["exit_code"])
    )


class _Ended(CftError):
    """What the first rank wrote of the run's end."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.exit_code = code


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
