"""What the scenarios of `chaos.py` share: a run that can be killed, and what it must end with."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SMALL = (
    "experiment=smoke",
    "constraint=function",
    "prompts.prompts_per_iteration=16",
    "prompts.samples_per_prompt=4",
    "auxiliary.max_epochs=3",
    "trainer.steps_per_iteration=4",
    "trainer.warmup_steps=1",
    "evaluation.max_prompts=8",
    "evaluation.samples_per_prompt=4",
    "evaluation.max_validation_rows=4",
)
SCORER = """
import ctypes, json, os, time

def score(prompts, completions):
    frozen = os.environ.get("CHAOS_FROZEN", "")
    if os.path.exists(frozen) and open(frozen).read() == os.environ.get("RANK"):
        ctypes.PyDLL(None).sleep(600)  # unlike CDLL, it keeps the interpreter's lock
    with open(os.environ["CHAOS_PAID"], "a") as file:
        for pair in zip(prompts, completions):
            file.write(json.dumps(pair) + "\\n")
    time.sleep(float(os.environ.get("CHAOS_LATENCY", "0")))
    return [float(not set("aeio") & set(text)) for text in completions]
"""
KINDS = {
    "alternating": ([], 1),
    "overlapped": (["trainer=overlapped"], 1),
    "data parallel": ([], 2),
    "overlapped peers": (["trainer=overlapped", "placement=peers"], 2),
}
PATIENCE = 600.0  # seconds after which something hangs; machines may be busy


class Broken(Exception):
    """A promise was not kept."""


@dataclass
class Run:
    """A run folder and the processes that work on it."""

    folder: Path
    overrides: Sequence[str]
    processes: int
    extra: Sequence[str] = ()
    paid: list[Path] = field(default_factory=list)
    child: subprocess.Popen[str] | None = None

    def start(self, **environment: str) -> None:
        """Begin it, or continue it where there is something to continue."""
        again = (self.folder / "status.json").exists()
        where = ["--resume", str(self.folder)] if again else [f"output_dir={self.folder}"]
        overrides = (
            []
            if again
            else [*SMALL, *self.overrides, f"constraint.scorer.path={self._scorer}:score"]
        )
        self.paid.append(self.folder.with_suffix(f".paid{len(self.paid)}"))
        behind = ["--", *self.extra] if self.extra else []
        self.child = subprocess.Popen(
            [
                *(sys.executable, "-m", "constrained_ft.cli.main", "train", *overrides, *where),
                *("--nproc-per-node", str(self.processes), *behind),
            ],
            env=dict(os.environ)
            | {"CHAOS_PAID": str(self.paid[-1]), "OMP_NUM_THREADS": "1"}
            | environment,
            cwd=self.folder.parent,  # a checkout's own folders would hide the installed package
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    @property
    def _scorer(self) -> Path:
        file = self.folder.parent / "scorer.py"
        if not file.exists():
            file.write_text(SCORER)
        return file

    def wait(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        assert self.child is not None
        try:
            said, _ = self.child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise Broken(f"{self.folder.name} hangs") from error
        return self.child.returncode, said

    def finish(self, **environment: str) -> None:
        """Start it and see it end well."""
        self.start(**environment)
        code, said = self.wait()
        if code != 0:
            raise Broken(f"{self.folder.name} ended with {code}:\n{said[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to the launcher, torchrun and all workers."""
        assert self.child is not None
        self.child.kill()
        for pid in self.pids():
            with_no_one_there(lambda pid=pid: os.kill(pid, signal.SIGKILL))
        self.child.communicate()
        while self.pids():  # the kernel takes a moment
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """All living processes whose command line names the folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    said = (entry / "cmdline").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if str(self.folder).encode() in said and state != "Z":
                    found.append(int(entry.name))
        return found

    def record(self, rank: int) -> dict[str, object]:
        """The record of a rank of the newest start; empty where there is none yet."""
        attempts = sorted(self.folder.glob("logs/attempt_*"), key=lambda path: path.stat().st_mtime)
        try:
            return dict(json.loads((attempts[-1] / f"rank_{rank}.json").read_text()))
        except (OSError, ValueError, IndexError):
            return {}

    def await_training(self, *, before: int) -> bool:
        """Wait until a process polls for signals; false where the run ended first.

        Args:
            before: lines of the log of rank 0 when it was started.
        """
        assert self.child is not None
        begun = time.monotonic()
        while self.child.poll() is None:
            if self.log_lines() > before:
                return True
            if time.monotonic() - begun > PATIENCE:
                raise Broken(f"{self.folder.name} does not begin")
            time.sleep(0.02)
        return False

    def log_lines(self) -> int:
        """Lines in the logs of rank 0, of all starts."""
        files = self.folder.glob("logs/attempt_*/rank_0.log")
        return sum(len(file.read_text().splitlines()) for file in files)

    def iterations(self) -> int:
        """Finished ones."""
        file = self.folder / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def status(self) -> dict[str, object]:
        """What the run says of itself."""
        return dict(json.loads((self.folder / "status.json").read_text()))

    def digest(self) -> str:
        """Of every tensor and number that it ends with."""
        newest = sorted(self.folder.glob("checkpoints/iteration_*"))[-1]
        files = [
            *sorted((self.folder / "final").rglob("*")),
            *sorted(newest.glob("*.safetensors")),
            *sorted((self.folder / "rollouts").iterdir()),
            self.folder / "evaluation.json",
        ]
        whole = hashlib.sha256()
        for file in files:
            if file.is_file():
                whole.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return whole.hexdigest()

    def paid_twice(self) -> int:
        """Texts that the scorer was asked for more than once, but for the probes of each start."""
        asked = Counter(
            line
            for file in self.paid
            if file.exists()
            for line in file.read_text().splitlines()
            if "The weather was" not in line and line != '["This is", " a test."]'
        )
        return sum(count - 1 for count in asked.values())


def with_no_one_there(call: Callable[[], object]) -> None:
    """Signals may come too late."""
    try:
        call()
    except ProcessLookupError:
        return


def require(kept: bool, promise: str) -> None:  # noqa: FBT001  # reads like assert
    """Raise where a promise is broken."""
    if not kept:
        raise Broken(promise)


def undisturbed(place: Path, name: str, iterations: int) -> tuple[Run, str]:
    """A run of one kind that nobody disturbs, and its digest."""
    overrides, processes = KINDS[name]
    folder = place / f"straight-{name.replace(' ', '-')}-{iterations}"
    run = Run(folder, [*overrides, f"trainer.iterations={iterations}"], processes)
    if not folder.exists():
        run.finish()
    return run, run.digest()


def disturbed(place: Path, straight: Run, name: str) -> Run:
    """Another run of the same configuration."""
    return Run(place / name, straight.overrides, straight.processes)
