"""The folder of one run: where its files are, what state it is in, and who may write to it.

config.yaml                         fully resolved; what workers read
command.sh  environment.json        how to get it again: command, versions, machine, seed
status.json                         state, iteration, last checkpoint, reason, exit code
metrics.jsonl                       one row an iteration
rollouts/  checkpoints/             one entry an iteration
scores/rank_0.sqlite                every score that was asked for, so that none is asked for twice
samples/                            what the LLM says to fixed prompts, some 8 times
logs/attempt_1/                     of every start
final/llm/  final/adapter/  final/auxiliary/
evaluation.json                     the table before and after, with intervals
phases.json                         where the time and the memory went
report/                             what `cft report` makes of all this
tracker/                            what a tracker keeps, and which of its runs this is
slurm/                              the script of a Slurm job, and what it printed

Nothing here imports torch.
"""

import fcntl
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from constrained_ft.compose import config_to_yaml, differences, load_config
from constrained_ft.config import Config
from constrained_ft.errors import ConfigError
from constrained_ft.machine import processor

__all__ = ["RunFolder", "State", "newest_unfinished", "write_atomically"]

State = Literal["running", "finished", "failed", "interrupted", "diverged"]

# What `clean` may delete; anything else in the folder is not ours.
_OURS = (
    *("config.yaml", "command.sh", "environment.json", "status.json", "metrics.jsonl"),
    *(
        "rollouts",
        "samples",
        "scores",
        ".rehearsal",
        "adapters",
        "checkpoints",
        "logs",
        "final",
        "evaluation.json",
        "phases.json",
        "report",
        "tracker",
    ),
)
_LOCK = ".lock"
_PACKAGES = (
    *("constrained-ft", "torch", "transformers", "tokenizers", "datasets", "peft", "safetensors"),
    *("numpy", "hydra-core", "omegaconf", "pydantic", "gguf", "scikit-learn"),
    "alt-profanity-check",
)


class RunFolder:
    """A run folder by its path; `start` and `resume` make this process its only writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def command_file(self) -> Path:
        """The command that started the run, as a script."""
        return self.path / "command.sh"

    @property
    def environment_file(self) -> Path:
        """Versions, machine and seed."""
        return self.path / "environment.json"

    @property
    def status_file(self) -> Path:
        """State, iteration, last checkpoint, reason, exit code."""
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON row an iteration."""
        return self.path / "metrics.jsonl"

    @property
    def evaluation_file(self) -> Path:
        """The table before and after, with intervals."""
        return self.path / "evaluation.json"

    @property
    def phases_file(self) -> Path:
        """Seconds, tokens and padding of each phase, and memory at the peak."""
        return self.path / "phases.json"

    @property
    def tracker(self) -> Path:
        """What a tracker keeps here."""
        return self.path / "tracker"

    @property
    def scores(self) -> Path:
        """Scores that were paid for, one file a process."""
        return self.path / "scores"

    @property
    def launchers(self) -> Path:
        """Where the launchers on several machines speak to each other; before a run begins, too."""
        return self.path / ".machines"

    @property
    def slurm(self) -> Path:
        """The script of a Slurm job, the configuration that it starts with, and what it prints."""
        return self.path / "slurm"

    @property
    def rehearsal(self) -> Path:
        """Where an export is tried before training; gone afterwards."""
        return self.path / ".rehearsal"

    @property
    def adapters(self) -> Path:
        """Adapters while a sampling server needs them."""
        return self.path / "adapters"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def final_llm(self) -> Path:
        """The fine-tuned model; loads with plain transformers."""
        return self.path / "final" / "llm"

    @property
    def final_adapter(self) -> Path:
        """The LoRA adapter that `final_llm` has merged."""
        return self.path / "final" / "adapter"

    @property
    def final_auxiliary(self) -> Path:
        """The auxiliary that belongs to `final_llm`."""
        return self.path / "final" / "auxiliary"

    def rollouts_file(self, iteration: int) -> Path:
        """Rollouts of one iteration, one JSON row each."""
        return self.path / "rollouts" / f"iteration_{iteration:04d}.jsonl"

    def samples_file(self, iteration: int) -> Path:
        """Completions of the fixed prompts after one iteration."""
        return self.path / "samples" / f"iteration_{iteration:04d}.jsonl"

    def checkpoint(self, iteration: int) -> Path:
        """The checkpoint after one iteration."""
        return self.checkpoints / f"iteration_{iteration:04d}"

    def logs(self) -> Path:
        """The log folder of this attempt; made on first use."""
        folder = self.path / "logs" / f"attempt_{self.status().get('attempt', 1)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            ConfigError: if the folder holds no run, or its configuration cannot be read.
        """
        if not self.config_file.is_file():
            raise ConfigError(
                f"{self.path} holds no run: there is no {self.config_file.name} in it"
            )
        return load_config(self.config_file)

    def start(self, config: Config, command: Sequence[str], *, clean: bool = False) -> "RunFolder":
        """Begin a run here.

        Args:
            config: what is run.
            command: the command line, for `command.sh`.
            clean: delete the run that the folder holds.

        Raises:
            ConfigError: if the folder holds a run that trained, another process writes to it, or it
                cannot be written.
        """
        self._take()
        if self._has_trained() and not clean:
            self.close()
            finished = self.status().get("state") == "finished"
            go_on = "" if finished else f"continue it with --resume {self.path}, "
            raise ConfigError(
                f"{self.path} holds a run ({self._in_words()}); {go_on}delete it with --clean, or "
                "choose another output_dir=PATH"
            )
        self._delete_run()
        write_atomically(self.config_file, config_to_yaml(config))
        where = shlex.quote(str(Path.cwd()))
        write_atomically(self.command_file, f"#!/bin/sh\ncd {where} && {shlex.join(command)}\n")
        self.add_environment(_environment(config))
        self.write_status("running", attempt=1, started=_now(), iteration=0, last_checkpoint=None)
        return self

    def fork(
        self, source: "RunFolder", config: Config, command: Sequence[str], *, clean: bool = False
    ) -> "RunFolder":
        """Begin a run here where another one stands: with its checkpoints, numbers and scores.

        Raises:
            ConfigError: if the other folder holds no checkpoint, or this one cannot be started in.
        """
        if not source.checkpoints.is_dir():
            raise ConfigError(f"{source.path} holds no checkpoint to continue from")
        self.start(config, command, clean=clean)
        for theirs, ours in (
            (source.checkpoints, self.checkpoints),
            (source.scores, self.scores),
        ):
            if theirs.is_dir():
                ignored = shutil.ignore_patterns(".tmp-*")
                shutil.copytree(theirs, ours, ignore=ignored, dirs_exist_ok=True)
        if source.metrics_file.exists():
            shutil.copy(source.metrics_file, self.metrics_file)
        done = source.status().get("iteration", 0)
        self.write_status(
            "running",
            iteration=done,
            forked_from={"folder": str(source.path.resolve()), "iteration": done},
        )
        return self

    def resume(self, config: Config, command: Sequence[str]) -> "RunFolder":
        """Continue the run of this folder.

        Args:
            config: what the command line asks for; it must be what the folder was started with.
            command: the command line, noted in `command.sh`.

        Raises:
            ConfigError: if the folder holds no run, another process writes to it, or the
                configuration is another one.
        """
        theirs = self.config()
        changed = differences(theirs, config.model_copy(update={"output_dir": theirs.output_dir}))
        if changed:
            lines = [f"  {key}: {was} there, {now} here" for key, (was, now) in changed.items()]
            raise ConfigError(
                f"{self.path} was started with another configuration:\n"
                + "\n".join(lines)
                + "\nResume it without these changes, or continue from it in a folder of its own "
                "with --fork."
            )
        self._take()
        with self.command_file.open("a") as file:
            file.write(f"# continued on {_now()}: {shlex.join(command)}\n")
        earlier = self.environment()
        history = earlier.pop("earlier_attempts", [])
        self.add_environment(_environment(config) | {"earlier_attempts": [*history, earlier]})
        self.write_status("running", attempt=int(self.status().get("attempt", 0)) + 1)
        return self

    def status(self) -> dict[str, Any]:
        """What `status.json` says; empty where there is none."""
        return _read_json(self.status_file)

    def write_status(self, state: State, **facts: object) -> None:
        """Replace `status.json`.

        Args:
            state: where the run stands.
            facts: `iteration`, `last_checkpoint`, `reason`, `exit_code` and the like; what is not
                given stays as it was, but for reason and exit code, which belong to one state.
        """
        kept = self.status() | {"reason": None, "exit_code": None}
        own = {"state": state, "pid": os.getpid(), "host": socket.gethostname(), "updated": _now()}
        _write_json(self.status_file, kept | own | facts)

    def environment(self) -> dict[str, Any]:
        """What `environment.json` says; empty where there is none."""
        return _read_json(self.environment_file)

    def add_environment(self, facts: Mapping[str, object]) -> None:
        """Add facts to `environment.json`, such as the devices and the versions of scorers."""
        _write_json(self.environment_file, self.environment() | dict(facts))

    def is_running(self) -> bool:
        """Whether a process of this machine writes to the folder."""
        if self._lock is not None:
            return True
        if not (self.path / _LOCK).exists():
            return False
        lock = _lock(self.path)
        if lock is not None:
            _let_go(lock)
        return lock is None

    def delete(self) -> None:
        """Delete the run, and the folder where nothing else is in it.

        Raises:
            ConfigError: if another process writes to it, or it cannot be deleted.
        """
        self._take()
        try:
            self._delete_run()
            for place in (self.launchers, self.slurm):
                shutil.rmtree(place, ignore_errors=True)
            (self.path / _LOCK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be deleted: {error.strerror}; delete it by hand"
            ) from None
        finally:
            self.close()

    def lock_descriptors(self) -> tuple[int, ...]:
        """What a child process inherits to hold the lock too."""
        assert self._lock is not None
        return (self._lock,)

    def close(self) -> None:
        """Let other processes write here again."""
        if self._lock is not None:
            _let_go(self._lock)
            self._lock = None

    def _take(self) -> None:
        """Make this process the only writer. The lock goes away with the process."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"output_dir={self.path} cannot be used: {reason}") from None
        if self._lock is None:
            host, pid = _holder(self.path) or ("another machine", "unknown")
            raise ConfigError(
                f"process {pid} on {host} is writing to {self.path}; wait for it, or choose "
                f"another output_dir=PATH (if it is gone for good, delete {self.path / _LOCK})"
            )
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"output_dir={self.path} cannot be written")

    def _has_trained(self) -> bool:
        """Whether there is work here that a new start would lose."""
        status = self.status()
        if not status:
            return self.config_file.exists() or self.checkpoints.exists()
        return bool(status.get("iteration")) or status["state"] == "finished"

    def _in_words(self) -> str:
        status = self.status()
        if not status:
            return "without a status"
        return f"{status['state']}, {status.get('iteration', 0)} iterations done"

    def _delete_run(self) -> None:
        for name in _OURS:
            place = self.path / name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)


def newest_unfinished(parent: Path, config: Config) -> RunFolder | None:
    """The run in `parent` that was started last, with this configuration, and did not finish.

    Passed over are runs that another process is writing to, runs that a guard stopped (they would
    be stopped again), and folders that cannot be read.
    """
    found = []
    for file in parent.glob("*/status.json"):
        folder = RunFolder(file.parent)
        status = folder.status()
        if status.get("state") in (None, "finished", "diverged") or folder.is_running():
            continue
        try:
            theirs = folder.config()
        except ConfigError:
            continue
        if not differences(theirs, config.model_copy(update={"output_dir": theirs.output_dir})):
            found.append((str(status.get("started", "")), folder))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def write_atomically(file: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new, never a part.

    Args:
        file: its folder is made if need be.
        text: all of it.
        durable: wait until it has reached the disk, which a loss of power needs.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _write_json(file: Path, tree: Mapping[str, object]) -> None:
    write_atomically(file, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    return dict(tree)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lock(folder: Path) -> int | None:
    """The lock of a folder, which lives as long as its descriptor; None if another holds it.

    It names its holder, for messages. On a file system without locks the name alone decides: a
    process of this machine that is gone holds nothing; one of another machine cannot be asked.
    """
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    holder = _holder(folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    except OSError:
        free = holder is None or (holder[0] == socket.gethostname() and not _lives(holder[1]))
    if not free:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    me = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    os.pwrite(descriptor, me.encode(), 0)
    return descriptor


def _let_go(descriptor: int) -> None:
    with suppress(OSError):  # of a file system that has become read-only
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


def _holder(folder: Path) -> tuple[str, int] | None:
    """Host and process that wrote the lock last; None where none did, or let go of it."""
    try:
        named = json.loads((folder / _LOCK).read_text())
        return str(named["host"]), int(named["pid"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _environment(config: Config) -> dict[str, object]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": _now(),
        "seed": config.seed,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "host": socket.gethostname(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions,
        "git_revision": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit that the package's source is at, `+` where it was changed; None for a wheel."""
    source = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None:
        return None
    revision = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../cli", "../conf")
    return f"{revision}+" if changed else revision
