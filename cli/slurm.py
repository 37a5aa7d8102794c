"""`cft train --slurm OPTIONS`: write the batch script of a run, and submit it.

submitit, which Hydra's Slurm launcher is built on, submits Python functions and requeues a job from
within a signal handler, before the function has come to a safe point; a run on several machines
needs a launcher on each and a requeue that follows from its exit code. So the script is ours.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from constrained_ft.cli.launch import Request
from constrained_ft.cli.settings import settings
from constrained_ft.errors import ConfigError

if TYPE_CHECKING:
    from constrained_ft.config import Config
    from constrained_ft.run_folder import RunFolder

__all__ = ["batch_script", "submit"]

_WARNING_SECONDS = 180
_IDLE_STARTS = 3
_OURS = ("-N", "--nodes", "-n", "--ntasks", "--ntasks-per-node", "-a", "--array")

_SCRIPT = """\
#!/bin/bash
{options}

# Written by `cft train --slurm`. One launcher runs on each node; they meet on the first node.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export CFT_ENDPOINT="$first:$((10000 + SLURM_JOB_ID % 20000))"
if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
newest() {{ ls {checkpoints} 2>/dev/null | tail -n 1; }}
before=$(newest)

# Ahead of the time limit Slurm sends USR1 to this shell; the run then stops at the next safe point.
# A preemption sends TERM to the launchers itself.
trap 'interrupted=1; kill -USR1 "$step" 2>/dev/null' USR1
trap 'interrupted=1' TERM

srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 \\
  bash -c {launch} cft \\
  {command} &
step=$!
interrupted=1
while [ -n "$interrupted" ]; do
  interrupted=
  wait "$step"
  code=$?
done

if [ "$code" -ne 75 ]; then exit "$code"; fi
case $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) in
  COMPLETING | CANCELLED | PREEMPTED)
    echo "interrupted; Slurm ends this job, and requeues it or not"
    exit 75 ;;
esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {idle} ] && [ "$before" = "$(newest)" ]; then
  echo "interrupted, and this start finished no iteration: not requeued" >&2
  exit 75
fi
echo "interrupted; requeueing, the run goes on from its newest checkpoint"
scontrol requeue "$SLURM_JOB_ID"
"""


def submit(request: Request, options: str, *, dry_run: bool) -> None:
    """Submit a run, or print its script.

    Args:
        request: what the command line says.
        options: of sbatch, as on a command line.
        dry_run: print, and write and submit nothing.

    Raises:
        ConfigError: if the configuration or an option is wrong, or Slurm refuses the job.
        ExtraError: if the package of the configuration's tracker is missing.
    """
    from constrained_ft.compose import config_to_yaml
    from constrained_ft.run_folder import write_atomically

    config, folder = _run_of(request)
    script = batch_script(request, config, folder.path.resolve(), _lines(options))
    if dry_run:
        print(script, end="")  # noqa: T201  # to be piped: no width, no colours
        return
    write_atomically(folder.slurm / "config.yaml", config_to_yaml(config))
    write_atomically(folder.slurm / "job.sh", script)
    job = _sbatch(folder.slurm / "job.sh")
    settings.say(f"job {job}: {folder.path}; what it prints goes to {folder.slurm / f'{job}.log'}")


def batch_script(request: Request, config: "Config", folder: Path, options: Sequence[str]) -> str:
    """The script that sbatch is given.

    Args:
        request: how many nodes and processes, and what torchrun is told.
        config: of the run.
        folder: of the run, absolute.
        options: of sbatch, one a line; they come after ours, so they win.
    """
    nodes = request.processes.nodes
    ours = [
        f"--job-name=cft-{config.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(f'{folder}/slurm/%j.log')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{_WARNING_SECONDS}",
    ]
    many = ["--nproc-per-node", request.nproc]
    if request.processes.max_restarts:
        many += ["--max-restarts", str(request.processes.max_restarts)]
    meeting = f'--nnodes {nodes} --node-rank "$SLURM_NODEID" --rdzv-endpoint "$CFT_ENDPOINT"'
    start = [sys.executable, "-m", "constrained_ft.cli.main", *settings.flags(), "train"]
    run = ["--config", f"{folder}/slurm/config.yaml", "--resume", "auto", f"output_dir={folder}"]
    rest = ["--", *settings.torchrun] if settings.torchrun else []
    # What stands behind `--` has to come last, so it goes to the shell as its own words.
    launch = f'exec {shlex.join(start)} {meeting if nodes > 1 else ""} "$@"'
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {line}" for line in [*ours, *options]),
        checkpoints=shlex.quote(f"{folder}/checkpoints"),
        nodes=nodes,
        launch=shlex.quote(launch),
        command=shlex.join([*run, *many, *rest]),
        idle=_IDLE_STARTS,
    )


def _run_of(request: Request) -> "tuple[Config, RunFolder]":
    """The run that the job starts or continues, checked as far as this machine can."""
    from constrained_ft.run_folder import RunFolder, newest_unfinished
    from constrained_ft.trackers import require_installed

    if request.clean or request.fork:
        raise ConfigError("a job may start more than once, so --slurm takes no --clean or --fork")
    if request.resume in ("none", "auto"):
        config = request.config()
        folder = RunFolder(Path(config.output_dir))
        if request.resume == "auto" and not request.names_folder():
            folder = newest_unfinished(folder.path.parent, config) or folder
        elif request.resume == "none" and folder.status():
            raise ConfigError(
                f"{folder.path} holds a run; continue it with --resume {folder.path}, or choose "
                "another output_dir=PATH"
            )
    else:
        folder = RunFolder(Path(request.resume))
        if request.overrides or request.config_file is not None:
            raise ConfigError(f"--slurm --resume {folder.path} continues the run as it is")
        config = folder.config()
    if request.nproc != "auto":  # else the nodes count their GPUs, and check
        replace(request.processes, per_node=_number(request.nproc)).check(config)
    require_installed(config.tracker)
    return config, folder


def _number(nproc: str) -> int:
    if not nproc.isdecimal():
        raise ConfigError(f"--nproc-per-node {nproc} must be auto or a number")
    return max(1, int(nproc))


def _lines(options: str) -> list[str]:
    """Options of sbatch, each with its value."""
    lines: list[list[str]] = []
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ConfigError(f"--slurm {options!r} cannot be read: {error}") from None
    for word in words:
        if word.startswith("-"):
            if word.partition("=")[0] in _OURS:
                raise ConfigError(f"--slurm takes no {word}; --nnodes N says how many nodes")
            lines.append([])
        elif not lines:
            raise ConfigError(f"--slurm {options!r} must be options of sbatch, as --time=4:00:00")
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]


def _sbatch(script: Path) -> str:
    """Submit; returns the number of the job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            f"there is no sbatch on this machine; submit {script} where there is"
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
