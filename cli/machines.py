"""A run on several machines: one launcher on each, and the first one leads.

The launchers speak through small files in the run folder, which all of them see. Each writes its
own about once a second, so a launcher whose file stands still is gone, whatever it died of; no
clocks are compared. The first one says which start they share, by the tokens that they drew, so
what an earlier run left behind names nobody. When a start fails, the first one ends the run or,
with `--max-restarts`, begins the next start as soon as all launchers are there again.

torchrun's own restarts do not outlive a machine: in torch 2.13, one that comes back waits for the
address of the new round, which nobody writes (seen with two launchers and `--rdzv-backend c10d`).
"""

import json
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from constrained_ft.cli.settings import settings
from constrained_ft.cli.torchrun import SIGNALS, Ended, Processes, conclude, run_torchrun
from constrained_ft.errors import CftError, ConfigError, Interrupted, PeerError
from constrained_ft.run_folder import write_atomically

if TYPE_CHECKING:
    from constrained_ft.run_folder import RunFolder

__all__ = ["Machine", "Roll", "join_run", "lead_run"]

_LOOK_SECONDS = 1.0
_GONE_LOOKS = 60  # a file that stands still for so long; a slow file system holds up the looks too
_PATIENCE_LOOKS = 600  # for launchers that are still to come
_GRACE_LOOKS = 10  # for processes to notice by themselves that a start is over


@dataclass(kw_only=True)
class Machine:
    """What a launcher says of itself."""

    token: str
    host: str
    beat: int = 0
    attempt: int = 0
    """The first machine: the newest start. The others: the newest start that failed there."""
    members: list[str] = field(default_factory=list)
    """The first machine: the tokens of those who share the newest start."""
    code: int | None = None
    """The first machine: the exit code, once the run has ended."""


class Roll:
    """All launchers of a run, as one of them sees them."""

    def __init__(self, folder: Path, own: int, count: int, gone_looks: int = _GONE_LOOKS) -> None:
        """See nobody yet.

        Args:
            folder: where they speak, seen by all.
            own: which machine this is, from 0.
            count: of machines.
            gone_looks: how often another's file may be found as it was.
        """
        self._folder, self._own, self._gone = folder, own, gone_looks
        self._me = Machine(token=uuid.uuid4().hex, host=socket.gethostname())
        self._others: dict[int, Machine | None] = {n: None for n in range(count) if n != own}
        self._still = dict.fromkeys(self._others, gone_looks)
        self._over = 0

    def look(self) -> None:
        """Say that this launcher lives, and see which others do."""
        self._me.beat += 1
        self._write()
        for number, seen in self._others.items():
            found = self._read(number)
            if found is None or found == seen:
                self._still[number] += 1
            else:
                # Seen once says nothing: it may have been there for days.
                self._still[number] = self._gone if seen is None else 0
            self._others[number] = found or seen

    def gather(self) -> None:
        """Wait until all launchers live.

        Raises:
            Interrupted: naming those that did not come.
        """
        for _ in range(_PATIENCE_LOOKS):
            self.look()
            if all(self._lives(number) for number in self._others):
                return
            time.sleep(_LOOK_SECONDS)
        missing = ", ".join(str(number) for number in self._others if not self._lives(number))
        raise Interrupted(f"machine {missing} did not come within {_PATIENCE_LOOKS} s")

    def begin(self, attempt: int) -> None:
        """Announce a start of all launchers that are there."""
        self._me.members = [one.token for one in self._others.values() if one is not None]
        self._me.attempt, self._over = attempt, 0
        self._write()

    def end(self, code: int) -> None:
        """Announce the end of the run."""
        self._me.code = code
        self._write()

    def failed(self, attempt: int) -> None:
        """Say that a start failed here."""
        self._me.attempt = attempt
        self._write()

    def trouble(self) -> bool:
        """Look, on the first machine; whether the processes of this start wait in vain."""
        self.look()
        failed = [one for one in self._others.values() if one and one.attempt == self._me.attempt]
        self._over = self._over + 1 if failed else 0
        return self._over > _GRACE_LOOKS or bool(self._absent())

    def lost(self) -> list[str]:
        """On the first machine: look until all live or are gone; names those that left."""
        before = {number: one and one.beat for number, one in self._others.items()}
        while any(
            self._lives(number) and one is not None and one.beat == before[number]
            for number, one in self._others.items()
        ):
            time.sleep(_LOOK_SECONDS)
            self.look()
        return [self._name(number) for number in self._absent()]

    def superseded(self, attempt: int) -> bool:
        """Look, on another machine; whether the processes of a start wait in vain."""
        self.look()
        first = self._others[0]
        gone_on = first is None or first.attempt != attempt or first.code is not None
        self._over = self._over + 1 if gone_on else 0
        return self._over > _GRACE_LOOKS or not self._lives(0)

    def next_start(self, after: int, *, patient: bool) -> int | None:
        """On another machine: wait for the first one's next start, or for the end of the run.

        Args:
            after: the start that this machine had last; 0 for none.
            patient: wait for a first machine that is gone, or not there yet.

        Returns:
            The start, or None if the run has ended.

        Raises:
            Interrupted: if the first machine is gone.
        """
        waited, self._over = 0, 0
        while True:
            self.look()
            first = self._others[0]
            if first is not None and self._me.token in first.members:
                if first.code is not None:
                    return None
                if first.attempt > after:
                    return first.attempt
                waited = 0 if self._lives(0) else waited + 1
            else:
                waited += 1
            if waited > (_PATIENCE_LOOKS if patient else 0):
                words = "has begun no run" if first is None else "is gone"
                raise Interrupted(f"{self._name(0)} {words}")
            time.sleep(_LOOK_SECONDS)

    @property
    def code(self) -> int:
        """On another machine: the exit code that the first one announced."""
        first = self._others[0]
        assert first is not None
        assert first.code is not None
        return first.code

    def leave(self) -> None:
        """Take this launcher's file away, unless it still has something to say."""
        if self._own > 0:
            self._file(self._own).unlink(missing_ok=True)

    def _absent(self) -> list[int]:
        """Members of the newest start that are gone, or that came again."""
        return [
            number
            for number, one in self._others.items()
            if one is None or one.token not in self._me.members or not self._lives(number)
        ]

    def _lives(self, number: int) -> bool:
        return self._still[number] < self._gone

    def _name(self, number: int) -> str:
        one = self._others[number]
        return f"machine {number}" + (f" ({one.host})" if one else "")

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.json"

    def _write(self) -> None:
        text = json.dumps(asdict(self._me))
        try:
            write_atomically(self._file(self._own), text, durable=False)
        except OSError as error:  # later, the next look may do better
            if self._me.beat <= 1:
                raise ConfigError(
                    f"output_dir: {self._folder} cannot be written: {error.strerror}"
                ) from None

    def _read(self, number: int) -> Machine | None:
        try:
            return Machine(**json.loads(self._file(number).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def lead_run(folder: "RunFolder", processes: Processes, timeout: float) -> None:
    """Train on several machines, of which this is the first.

    Args:
        folder: of the run, begun or resumed.
        processes: on each machine.
        timeout: seconds that ranks wait for each other; launchers wait no longer.

    Raises:
        CftError: what ended the run.
        Interrupted: if a machine did not come, or is gone.
    """
    roll = Roll(folder.launchers, 0, processes.nodes, _gone_looks(timeout))
    code = 1
    try:
        _starts(folder, processes, roll)
        code = 0
    except CftError as error:
        code = error.exit_code
        raise
    finally:
        roll.end(code)


def _starts(folder: "RunFolder", processes: Processes, roll: Roll) -> None:
    left, attempt = processes.max_restarts, int(folder.status()["attempt"])
    while True:
        _gather(folder, processes, roll)
        roll.begin(attempt)
        ended = run_torchrun(
            folder, processes, attempt, descriptors=folder.lock_descriptors(), watch=roll.trouble
        )
        try:
            conclude(folder, attempt, ended)
            return
        except CftError as error:
            if error.exit_code != PeerError.exit_code:
                raise
            lost = roll.lost()
            if left == 0 and lost:
                raise _interrupted(folder, f"{', '.join(lost)} is gone") from error
            if left == 0:
                raise
            left -= 1
            again = f"starting again from the newest checkpoint ({left} restarts left)"
            settings.warn(f"{', '.join(lost) + ' is gone' if lost else error}; {again}")
            attempt += 1
            folder.write_status("running", attempt=attempt)


def _gather(folder: "RunFolder", processes: Processes, roll: Roll) -> None:
    settings.say(f"waiting for the launchers of {processes.nodes} machines")
    try:
        with _interruptible():
            roll.gather()
    except Interrupted as error:
        raise _interrupted(folder, str(error)) from None


def _interrupted(folder: "RunFolder", reason: str) -> Interrupted:
    """Write that the run can go on later; what to raise then."""
    folder.write_status("interrupted", reason=reason, exit_code=Interrupted.exit_code)
    return Interrupted(f"{reason}; `cft train --resume {folder.path}` continues")


def join_run(folder: "RunFolder", processes: Processes, timeout: float) -> None:
    """Start this machine's processes of a run that the first machine leads.

    Args:
        folder: of the run; the first machine may not have made it yet.
        processes: on each machine.
        timeout: as for `lead_run`.

    Raises:
        CftError: what ended the run, as the first machine says.
        Interrupted: if the first machine has begun no run, or is gone.
    """
    gone_looks = _gone_looks(timeout)
    roll = Roll(folder.launchers, processes.node_rank, processes.nodes, gone_looks)
    settings.say(f"machine {processes.node_rank} of {processes.nodes} waits for the first one")
    attempt, patient = 0, True
    try:
        while True:
            with _interruptible():
                start = roll.next_start(attempt, patient=patient)
            if start is None:
                break
            attempt, patient = start, processes.max_restarts > 0
            settings.say(f"start {attempt}; the logs are in {folder.path / 'logs'}")
            ended = run_torchrun(
                folder, processes, attempt, watch=partial(roll.superseded, attempt)
            )
            if ended.code != 0 and ended.received is not None:  # before training began
                raise Interrupted(f"stopped by {signal.Signals(ended.received).name}")
            if ended.code != 0:
                roll.failed(attempt)
    finally:
        roll.leave()
    if roll.code != 0:
        raise Ended(f"the first machine: {folder.status().get('reason')}", roll.code)


def _gone_looks(timeout: float) -> int:
    return max(3, min(_GONE_LOOKS, int(timeout)))


@contextmanager
def _interruptible() -> Iterator[None]:
    """While nothing runs that could be lost, a signal ends the wait at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
