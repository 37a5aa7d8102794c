"""Start a run's processes through torchrun, pass signals on to them, and say how they ended."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from constrained_ft.cli.settings import settings
from constrained_ft.cli.worker import Orders, RankRecord, attempt_folder, records
from constrained_ft.errors import CftError, ConfigError, Interrupted, PeerError
from constrained_ft.machine import usable_cores

if TYPE_CHECKING:
    from constrained_ft.config import Config
    from constrained_ft.run_folder import RunFolder

__all__ = ["SIGNALS", "Ended", "Outcome", "Processes", "conclude", "run_processes", "run_torchrun"]

_LOOK_SECONDS = 1.0

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How many processes, where, and what else torchrun is told."""

    per_node: int
    nodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    max_restarts: int = 0
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
        peers = config.placement.num_learning
        if peers >= self.total:
            raise ConfigError(
                f"placement.peers={peers} needs {peers + 1} processes or more, and "
                f"{self.total} would start; give --nproc-per-node {peers + 1}, or placement=inline"
            )

    def command(self, orders: Orders) -> list[str]:
        """The whole command line."""
        if self.endpoint is None:
            meeting = ["--standalone"]  # a port of its own: two runs never meet
            if self.max_restarts:
                meeting += ["--max-restarts", str(self.max_restarts)]
        else:
            # The first machine has the first ranks; what is started again is up to the launchers.
            meeting = [
                *("--rdzv-backend", "static", "--rdzv-endpoint", self.endpoint),
                *("--nnodes", str(self.nodes), "--node-rank", str(self.node_rank)),
            ]
        return [
            *(sys.executable, "-m", "torch.distributed.run", *meeting),
            *("--nproc-per-node", str(self.per_node), *self.extra),
            *("-m", "constrained_ft.cli.worker", orders.text()),
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How torchrun ended."""

    code: int
    said: str
    """On standard error."""
    received: int | None
    """The signal that came meanwhile."""


def run_processes(folder: "RunFolder", processes: Processes) -> None:
    """Train in several processes.

    Raises:
        CftError: what ended the run, as the workers wrote it to `status.json`.
        PeerError: naming the rank that died, and what it was doing.
    """
    attempt = int(folder.status().get("attempt", 1))
    # The lock is held until torchrun ends, even if this process is killed.
    ended = run_torchrun(folder, processes, attempt, descriptors=folder.lock_descriptors())
    conclude(folder, attempt, ended)


def run_torchrun(
    folder: "RunFolder",
    processes: Processes,
    attempt: int,
    *,
    descriptors: tuple[int, ...] = (),
    watch: Callable[[], bool] | None = None,
) -> Outcome:
    """Run this machine's processes to their end.

    Args:
        folder: of the run.
        processes: how many, and where the others are.
        attempt: which start this is.
        descriptors: that torchrun inherits.
        watch: called about once a second; says whether to kill all processes of this machine.
    """
    orders = Orders(
        folder=str(folder.path.resolve()),
        attempt=attempt,
        quiet=settings.quiet,
        verbose=settings.verbose,
        color=settings.color,
        debug=settings.debug,
    )
    # Of several processes on one machine, each takes its part of the cores.
    threads = str(max(1, usable_cores() // processes.per_node))
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
        said = _wait(child, watch, signalled.kill)
    return Outcome(code=child.returncode, said=said, received=signalled.received)


def _wait(
    child: subprocess.Popen[str], watch: Callable[[], bool] | None, kill: Callable[[], None]
) -> str:
    """What it says on standard error until it ends."""
    while True:
        try:
            return child.communicate(timeout=_LOOK_SECONDS if watch else None)[1] or ""
        except subprocess.TimeoutExpired:
            if watch is not None and watch():
                kill()


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
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # as signal.signal gave it

    def kill(self) -> None:
        """Leave nothing that could still write to the run folder."""
        for pid in (self._child.pid, *(one.pid for one in self._workers())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _workers(self) -> list[RankRecord]:
        """Those of this machine that have not ended."""
        return [
            one
            for one in _newest_records(self._folder, self._attempt)
            if one.ended is None and one.host == socket.gethostname()
        ]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        workers = self._workers()
        if self.received is not None:
            self.kill()
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


def conclude(folder: "RunFolder", attempt: int, ended: Outcome) -> None:
    """Raise what ended a start, if the run did not finish.

    Raises:
        CftError: as the workers wrote it to `status.json`, or that a rank died.
    """
    status, received = folder.status(), ended.received
    newest = _newest_records(folder.path, attempt)
    dead = [one for one in newest if one.ended is None]
    if dead and received is None:
        words = [f"rank {one.rank} (process {one.pid}) died while {one.doing}" for one in dead]
        words += [f"rank {one.rank} says: {one.missed}" for one in newest if one.missed]
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
        reason = _last_line(ended.said) or f"torchrun ended with code {ended.code}"
        folder.write_status("failed", reason=reason, exit_code=1)
        raise PeerError(reason)
    again = f"; `cft train --resume {folder.path}` continues"
    reason = str(status["reason"])
    raise Ended(
        reason + (again if status["state"] == "interrupted" else ""), int(status["exit_code"])
    )


class Ended(CftError):
    """What another process wrote of the run's end."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.exit_code = code


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
