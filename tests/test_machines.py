"""Runs on several machines: here, several launchers on one that meet over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from small import SMALL, small_config
from test_launch import cft, digests, rows

from constrained_ft.cli import machines
from constrained_ft.cli.launch import _processes
from constrained_ft.cli.machines import Roll, lead_run
from constrained_ft.cli.settings import settings
from constrained_ft.cli.torchrun import Outcome, Processes
from constrained_ft.errors import ConfigError, Interrupted
from constrained_ft.run_folder import RunFolder

PEERS = (*SMALL, "trainer=overlapped", "placement=peers", "placement.timeout=20")


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(machines, "_PATIENCE_LOOKS", 5)


@pytest.fixture
def rolls(tmp_path: Path, no_pauses: None) -> tuple[Roll, Roll]:
    return Roll(tmp_path, 0, 2, gone_looks=4), Roll(tmp_path, 1, 2, gone_looks=4)


def meet(first: Roll, second: Roll) -> None:
    for _ in range(2):
        first.look()
        second.look()
    first.gather()


# Who is there ------------------------------------------------------------------------------------


def test_launchers_share_a_start_and_its_end(rolls: tuple[Roll, Roll]) -> None:
    first, second = rolls
    meet(first, second)
    first.begin(3)
    assert second.next_start(0, patient=True) == 3
    first.end(75)
    assert second.next_start(3, patient=True) is None
    assert second.code == 75


def test_what_an_earlier_run_left_behind_starts_nothing(
    rolls: tuple[Roll, Roll], tmp_path: Path
) -> None:
    first, second = rolls
    meet(first, second)
    first.begin(1)  # and is killed: its file says so for ever
    later = Roll(tmp_path, 1, 2, gone_looks=4)
    with pytest.raises(Interrupted, match=r"machine 0 .* is gone"):
        later.next_start(0, patient=True)


def test_a_launcher_that_stands_still_is_gone(rolls: tuple[Roll, Roll]) -> None:
    first, second = rolls
    meet(first, second)
    first.begin(1)
    second.look()
    assert [first.trouble() for _ in range(6)] == [False] * 4 + [True] * 2
    assert first.lost() == [f"machine 1 ({socket.gethostname()})"]
    with pytest.raises(Interrupted, match="machine 1 did not come within"):
        first.gather()


def test_a_launcher_that_came_again_is_none_of_the_start(
    rolls: tuple[Roll, Roll], tmp_path: Path
) -> None:
    first, second = rolls
    meet(first, second)
    first.begin(1)
    again = Roll(tmp_path, 1, 2, gone_looks=4)
    again.look()
    assert first.trouble()
    meet(first, again)
    first.begin(2)
    assert again.next_start(0, patient=True) == 2


def test_processes_of_a_start_that_is_over_are_stopped(
    rolls: tuple[Roll, Roll], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_GRACE_LOOKS", 1)
    first, second = rolls
    meet(first, second)
    first.begin(1)
    second.next_start(0, patient=True)
    first.look()
    assert not second.superseded(1)
    first.begin(2)
    assert [second.superseded(1) for _ in range(2)] == [False, True]
    second.failed(2)
    assert [first.trouble() for _ in range(2)] == [False, True]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Roll(tmp_path / "file" / ".machines", 1, 2).look()


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_lost_machine_ends_the_run_or_begins_it_again(
    restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run").start(small_config(), ["cft", "train"])
    other = Roll(folder.launchers, 1, 2)
    starts = []

    def gather(roll: Roll) -> None:
        meet_again = Roll.look
        for _ in range(3):
            other.look()
            meet_again(roll)

    def torchrun(*arguments: object, **named: object) -> Outcome:
        starts.append(arguments[2])
        if len(starts) == 1:
            folder.write_status("failed", reason="a rank was lost", exit_code=1)
            return Outcome(code=1, said="", received=None)
        folder.write_status("finished", exit_code=0)
        return Outcome(code=0, said="", received=None)

    monkeypatch.setattr(Roll, "gather", gather)
    monkeypatch.setattr(machines, "run_torchrun", torchrun)
    processes = Processes(
        per_node=1, nodes=2, endpoint="127.0.0.1:1", max_restarts=restarts, extra=()
    )
    if restarts:
        lead_run(folder, processes, timeout=4.0)
        assert starts == [1, 2]
    else:
        with pytest.raises(Interrupted, match=r"machine 1 .* is gone; `cft train --resume"):
            lead_run(folder, processes, timeout=4.0)
        assert (folder.status()["state"], folder.status()["exit_code"]) == ("interrupted", 75)
    folder.close()


def test_the_launchers_restart_not_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "torchrun", ("--max-restarts", "1"))
    with pytest.raises(ConfigError, match="stands before --"):
        _processes("1", 2, 0, "127.0.0.1:1")


def test_a_sweep_takes_one_machine(tmp_path: Path) -> None:
    ran = cft(
        *("train", "-m", *SMALL, "seed=0,1"),
        *("--nnodes", "2", "--rdzv-endpoint", "127.0.0.1:1"),
        cwd=tmp_path,
    )
    assert ran.returncode == 2
    assert "jobs of a sweep take one machine each" in ran.stderr


# What comes of it --------------------------------------------------------------------------------


class Launcher:
    """One `cft train` in the background, killed with all that it started."""

    def __init__(self, rank: int, port: int, options: Sequence[str], cwd: Path) -> None:
        self.output = cwd / f"machine_{rank}.txt"
        with self.output.open("a") as stream:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "constrained_ft.cli.main", "train", *options),
                    *("--nproc-per-node", "1", "--nnodes", "2", "--node-rank", str(rank)),
                    *("--rdzv-endpoint", f"127.0.0.1:{port}"),
                ],
                cwd=cwd,
                env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
                stdout=stream,
                stderr=stream,
            )

    def code(self) -> int:
        try:
            return self.process.wait(timeout=150)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"did not end:\n{self.output.read_text()[-3000:]}")

    def kill(self) -> None:
        """As when the machine loses power: no process of it says anything any more."""
        family = [self.process.pid]
        for pid in family:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            family += [int(child) for child in children]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_until(happened: Callable[[], bool], launcher: Launcher) -> None:
    for _ in range(1500):
        if happened():
            return
        assert launcher.process.poll() is None, launcher.output.read_text()
        time.sleep(0.1)
    raise AssertionError(launcher.output.read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The weights of the same run in one process that nobody disturbed."""
    tmp_path = tmp_path_factory.mktemp("straight")
    ran = cft(
        *("train", *SMALL, "trainer=overlapped", "trainer.iterations=6", "output_dir=straight"),
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    return digests(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_with_restarts_a_machine_may_go_and_come_back(
    tmp_path: Path, straight: dict[str, str]
) -> None:
    options = (*PEERS, "trainer.iterations=6", "output_dir=run", "--max-restarts", "1")
    port = free_port()
    first = Launcher(0, port, options, tmp_path)
    second = Launcher(1, port, options, tmp_path)
    wait_until(lambda: (tmp_path / "run/checkpoints/iteration_0002").exists(), first)
    second.kill()
    second = Launcher(1, port, options, tmp_path)
    assert (first.code(), second.code()) == (0, 0), first.output.read_text()
    assert "machine 1" in first.output.read_text()
    logs = tmp_path / "run" / "logs"
    assert {file.name for file in (logs / "attempt_2").glob("*.log")} == {
        "rank_0.log",
        "rank_1.log",
    }
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("finished", 2)
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert digests(tmp_path / "run") == straight


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_first_machine_killed_ends_the_other_which_may_come_back_before_it(
    tmp_path: Path, straight: dict[str, str]
) -> None:
    options = (*PEERS, "trainer.iterations=6", "output_dir=run")
    port = free_port()
    first = Launcher(0, port, options, tmp_path)
    second = Launcher(1, port, options, tmp_path)
    wait_until(lambda: (tmp_path / "run/checkpoints/iteration_0002").exists(), first)
    first.kill()
    assert second.code() == 75
    assert f"machine 0 ({socket.gethostname()}) is gone" in second.output.read_text()
    # Nobody was left to write how it ended, so the folder says that the run is going on.
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"
    again = ("--resume", "run")
    second = Launcher(1, port, again, tmp_path)
    wait_until(lambda: (tmp_path / "run/.machines/1.json").exists(), second)
    first = Launcher(0, port, again, tmp_path)
    assert (first.code(), second.code()) == (0, 0), second.output.read_text()
    assert digests(tmp_path / "run") == straight
