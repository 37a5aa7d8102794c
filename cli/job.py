"""One job of a sweep: `cft train` in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.text import Text

from constrained_ft.cli.launch import Request
from constrained_ft.cli.settings import Settings
from constrained_ft.machine import usable_cores
from constrained_ft.overrides import assignment
from constrained_ft.sweep_folder import SweepFolder

__all__ = ["STOPS", "Runner"]

STOPS = (75, 130)  # exit codes of a job that was interrupted: the sweep ends there too

_ONE_BY_ONE = "BasicLauncher"


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs jobs. A launcher may take it to another process, so it brings all that it needs."""

    path: Path
    """The folder of the sweep."""
    request: Request
    settings: Settings

    def __call__(self, tree: Any) -> None:
        """What Hydra calls for each job."""
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        overrides = [override.removeprefix("++") for override in hydra.overrides.task]
        alone = str(hydra.launcher["_target_"]).endswith(_ONE_BY_ONE)
        self.run(str(hydra.job.num), overrides, None if alone else hydra.launcher.get("n_jobs", 1))

    def run(self, number: str, overrides: Sequence[str], at_once: int | None = None) -> None:
        """Run a job and write down how it ended; once one was interrupted, none begins any more.

        Args:
            number: of the job, which names its folder.
            overrides: what it was asked for.
            at_once: how many jobs share this machine, as joblib counts them; what each prints goes
                to a file then. None for one by one.
        """
        sweep = SweepFolder(self.path)
        sweep.write(number, overrides)
        if any(job.exit_code in STOPS for job in sweep.jobs()):
            return
        self._say(f"\njob {number}: {' '.join(overrides)}", "bold")
        command = self._command(sweep, number, overrides)
        if at_once is None:
            code = _call(command)
        else:
            code = _call(command, log=sweep.log(number), threads=_threads(at_once))
            self._say(f"job {number}: {'done' if code == 0 else f'exit code {code}'}", "")
        sweep.write(number, overrides, code)

    def _command(self, sweep: SweepFolder, number: str, overrides: Sequence[str]) -> list[str]:
        """The job's own configuration, where the sweep has it, else its overrides."""
        request, wanted = self.request, list(overrides)
        if sweep.snapshot(number).exists():
            request = replace(request, config_file=sweep.snapshot(number), config_dirs=())
            wanted = []
        start = [sys.executable, "-m", "constrained_ft.cli.main", *self.settings.flags(), "train"]
        folder = assignment("output_dir", str(self.path / number))
        return [*start, *wanted, folder, *request.options()]

    def _say(self, text: str, style: str) -> None:
        if not self.settings.quiet:
            self.settings.console().print(Text(text, style=style), soft_wrap=True)


def _threads(at_once: int) -> dict[str, str]:
    """Of several jobs on one machine, each takes its part of the cores."""
    cores = usable_cores()
    # joblib: -1 is one job for each core, -2 one less, and so on.
    jobs = at_once if at_once > 0 else cores + 1 + at_once
    return {"OMP_NUM_THREADS": str(max(1, cores // max(1, jobs)))}


def _call(
    command: Sequence[str], *, log: Path | None = None, threads: dict[str, str] | None = None
) -> int:
    """Run a job; signals reach it, and this process outlives it."""
    output = None if log is None else log.open("ab")
    with subprocess.Popen(
        command, env=(threads or {}) | dict(os.environ), stdout=output, stderr=output
    ) as process:

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        # A terminal sends Ctrl-C to both processes, so SIGINT needs no forwarding.
        handlers = {
            signal.SIGINT: lambda number, frame: None,
            signal.SIGTERM: forward,
            signal.SIGUSR1: forward,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if output is not None:
        output.close()
    return code if code >= 0 else 128 - code
