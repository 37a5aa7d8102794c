"""The folder of a sweep: what each job was asked for, and how it ended.

jobs/0.yaml             the resolved configuration of job 0, as it was when the sweep began
jobs/0.json             its overrides, and its exit code once it has ended
jobs/0.log              what it printed, where several run at once
0/                      its run folder
sweep.json  front.png   what the finished ones came to

Jobs may run in other processes than the sweep, so the files are the record.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constrained_ft.compose import config_to_yaml
from constrained_ft.config import Config
from constrained_ft.errors import ConfigError
from constrained_ft.run_folder import RunFolder, write_atomically


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a sweep."""

    number: str
    overrides: str
    exit_code: int | None
    """0: done. None: it has not run to its end."""
    reason: str
    """Why it is not done, where its run folder says so."""


class SweepFolder:
    """A sweep by its path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def plot_file(self) -> Path:
        """The front, drawn."""
        return self.path / "front.png"

    def run(self, number: str) -> RunFolder:
        """The run folder of a job."""
        return RunFolder(self.path / number)

    def snapshot(self, number: str) -> Path:
        """The resolved configuration of a job; not there where a sweeper chose it on the way."""
        return self.path / "jobs" / f"{number}.yaml"

    def log(self, number: str) -> Path:
        """What a job printed, where several run at once."""
        return self.path / "jobs" / f"{number}.log"

    def begin(self, jobs: Sequence[tuple[Sequence[str], Config]]) -> None:
        """Write down all jobs, with their configurations; what an earlier sweep left is deleted."""
        shutil.rmtree(self.path / "jobs", ignore_errors=True)
        for number, (overrides, config) in enumerate(jobs):
            write_atomically(self.snapshot(str(number)), config_to_yaml(config))
            self.write(str(number), overrides)

    def write(self, number: str, overrides: Sequence[str], exit_code: int | None = None) -> None:
        """Write down a job; its exit code once it has ended."""
        tree = {"overrides": list(overrides), "exit_code": exit_code}
        write_atomically(self.path / "jobs" / f"{number}.json", json.dumps(tree) + "\n")

    def overrides(self, number: str) -> list[str]:
        """What a job was asked for."""
        return list(self._record(number)["overrides"])

    def jobs(self) -> list[Job]:
        """All jobs, in their order.

        Raises:
            ConfigError: if the folder holds no sweep.
        """
        numbers = sorted(int(file.stem) for file in (self.path / "jobs").glob("*.json"))
        if not numbers:
            raise ConfigError(f"{self.path} holds no sweep: there is no jobs/0.json in it")
        return [self._job(str(number)) for number in numbers]

    def _job(self, number: str) -> Job:
        record, status = self._record(number), self.run(number).status()
        code = record["exit_code"]
        if status.get("state") == "finished":
            code = 0  # also where it was continued alone
        return Job(
            number=number,
            overrides=" ".join(record["overrides"]),
            exit_code=code,
            reason="" if code == 0 else " ".join(str(status.get("reason") or "").split()),
        )

    def _record(self, number: str) -> dict[str, Any]:
        return dict(json.loads((self.path / "jobs" / f"{number}.json").read_text()))
