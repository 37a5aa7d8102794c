"""Kill, signal, corrupt and slow down small runs, and see that nothing is lost.

    python scripts/chaos.py short              what CI runs, about two minutes
    python scripts/chaos.py kill --count 20    one kind of trouble, as often as asked
    python scripts/chaos.py all                everything, about an hour; docs/reliability.md has it

Every kind prints what it did; the exit code is 1 where a promise was broken. Runs are compared by
the SHA-256 of every file of the final models and of the newest checkpoint.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
import json, os, time

def score(prompts, completions):
    with open(os.environ["CHAOS_PAID"], "a") as file:
        for pair in zip(prompts, completions):
            file.write(json.dumps(pair) + "\\n")
    time.sleep(float(os.environ.get("CHAOS_LATENCY", "0")))
    return [float(not set("aeio") & set(text)) for text in completions]
"""
KINDS = {
    "alternating": ([], 1),
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


def kill(place: Path, count: int, kinds: Sequence[str]) -> None:
    """SIGKILL of all processes at random times, continued each time: the same weights."""
    for name in kinds:
        iterations = 6 * count
        straight, expected = undisturbed(place, name, iterations)
        run = disturbed(place, straight, f"kill-{name.replace(' ', '-')}")
        chance, kills, lost = random.Random(1), 0, 0
        while kills < count:
            before = run.log_lines()
            run.start(CHAOS_LATENCY="0.05")
            if not run.await_training(before=before):
                raise Broken(f"{name}: ended before it was killed {count} times")
            time.sleep(chance.uniform(0.0, 2.0))
            if run.child is not None and run.child.poll() is not None:
                break
            run.kill()
            kills += 1
            saved = sorted(run.folder.glob("checkpoints/iteration_*"))
            if saved:
                lost = max(lost, run.iterations() - int(saved[-1].name[-4:]))
        require(kills == count, f"{name}: ended after {kills} kills")
        require(lost <= 1, f"{name}: {lost} finished iterations were lost")
        if run.status()["state"] != "finished":
            run.finish()
        require(run.digest() == expected, f"{name}: other weights after {kills} kills")
        print(
            f"kill, {name}: {kills} SIGKILLs, the same to the bit, {run.paid_twice()} scores were "
            f"in flight and asked for again, finished iterations lost: {lost}"
        )


def term(place: Path, count: int, kinds: Sequence[str]) -> None:
    """SIGTERM at random times: exit 75, continued to the same weights, no score paid twice."""
    for name in kinds:
        straight, expected = undisturbed(place, name, 6 * count)
        run = disturbed(place, straight, f"term-{name.replace(' ', '-')}")
        chance, signals, slowest = random.Random(2), 0, 0.0
        number = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        while signals < count:
            before = run.log_lines()
            run.start(CHAOS_LATENCY="0.05")
            if not run.await_training(before=before):
                break
            time.sleep(chance.uniform(0.0, 1.5))
            assert run.child is not None
            if run.child.poll() is not None:
                break
            run.child.send_signal(number[signals % 3])
            sent = time.monotonic()
            code, said = run.wait()
            slowest = max(slowest, time.monotonic() - sent)
            require(code in (0, 75), f"{name}: exit code {code} after a signal:\n{said[-2000:]}")
            if code == 0:
                break
            require(run.status()["state"] == "interrupted", f"{name}: {run.status()}")
            signals += 1
        require(signals == count, f"{name}: ended after {signals} signals")
        if run.status()["state"] != "finished":
            run.finish()
        require(run.digest() == expected, f"{name}: other weights after {signals} signals")
        require(run.paid_twice() == 0, f"{name}: {run.paid_twice()} scores were paid twice")
        print(
            f"term, {name}: {signals} signals, exit code 75 each, the same to the bit, no score "
            f"paid twice, {slowest:.1f} s at most until it had left"
        )


def boundaries(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Stopped after each iteration and continued: the same weights, whichever it was."""
    for name in kinds:
        straight, expected = undisturbed(place, name, count)
        for stop in range(1, count):
            run = disturbed(place, straight, f"boundary-{name.replace(' ', '-')}-{stop}")
            run.start()
            while run.iterations() < stop:
                time.sleep(0.005)
                require(run.child is not None and run.child.poll() is None, f"{name} ended early")
            run.kill()
            run.finish()
            require(run.digest() == expected, f"{name}: other weights after a stop at {stop}")
        print(f"boundaries, {name}: {count - 1} of {count - 1} the same to the bit")


def ranks(place: Path, count: int, kinds: Sequence[str]) -> None:
    """One rank dies or fails: all leave soon, the rank is named, --max-restarts continues."""
    for name in kinds:
        if KINDS[name][1] < 2:
            continue
        straight, expected = undisturbed(place, name, 10)
        for victim in range(2):
            run = disturbed(place, straight, f"rank-{name.replace(' ', '-')}-{victim}")
            before = run.log_lines()
            run.start(CHAOS_LATENCY="0.05")
            run.await_training(before=before)
            while run.iterations() < 2:
                time.sleep(0.01)
            os.kill(int(str(run.record(victim)["pid"])), signal.SIGKILL)
            sent = time.monotonic()
            code, said = run.wait()
            took = time.monotonic() - sent
            require(took < 30, f"{name}: {took:.0f} s until all had left")
            require(code == 1 and f"rank {victim}" in said, f"{name}: {code}, {said[-500:]}")
            require(not run.pids(), f"{name}: processes are left")
            print(
                f"ranks, {name}: rank {victim} killed, all left after {took:.1f} s: "
                f"{str(run.status()['reason']).partition(';')[0]}"
            )
            run.finish()
            require(run.digest() == expected, f"{name}: other weights after rank {victim} died")
        again = disturbed(place, straight, f"restart-{name.replace(' ', '-')}")
        again.extra = ["--max-restarts", "3"]
        before = again.log_lines()
        again.start(CHAOS_LATENCY="0.05")
        again.await_training(before=before)
        for attempt in range(min(count, 2)):
            while again.iterations() < 2 * (attempt + 1):
                time.sleep(0.01)
            os.kill(int(str(again.record(attempt)["pid"])), signal.SIGKILL)
            time.sleep(1)
        code, said = again.wait()
        require(code == 0, f"{name}: {code} with --max-restarts:\n{said[-2000:]}")
        require(again.digest() == expected, f"{name}: other weights after restarts")
        print(f"ranks, {name}: {min(count, 2)} deaths under --max-restarts 3, the same to the bit")


def sleeps(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Random pauses of up to half a second in every phase: the same weights, the same lags."""
    name = "overlapped peers"
    straight, expected = undisturbed(place, name, 10)
    for number in range(count):
        run = disturbed(place, straight, f"sleep-{number}")
        # Scripts of this folder come first for the workers: `sitecustomize` is run by each.
        helper = place / "sleeps"
        helper.mkdir(exist_ok=True)
        (helper / "sitecustomize.py").write_text(_SLEEPS)
        run.finish(PYTHONPATH=str(helper), CHAOS_SEED=str(number))
        rows = [
            json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        ]
        require([row["target/lag"] for row in rows] == [0.0, *[1.0] * 9], "another lag")
        require(run.digest() == expected, f"other weights with the pauses of seed {number}")
        shutil.rmtree(run.folder)
    print(
        f"sleeps, {name}: {count} runs of 10 iterations with pauses of 0 to 0.5 s in every phase: "
        "the same to the bit, lag 0 in the first iteration and 1 in all others"
    )


_SLEEPS = '''
import os, random, sys, time
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder


class Finder(MetaPathFinder):
    """Lets every phase of a run begin late."""

    def find_spec(self, name, path, target=None):
        if name != "constrained_ft.phases":
            return None
        spec = PathFinder.find_spec(name, path, target)
        inner = spec.loader.exec_module

        def exec_module(module):
            inner(module)
            during = module.Phases.during
            chance = random.Random(f"{os.environ['CHAOS_SEED']}/{os.environ.get('RANK')}")

            @contextmanager
            def late(self, phase):
                if phase not in ("evaluation", "rehearsal"):
                    time.sleep(chance.uniform(0.0, 0.5))
                with during(self, phase) as spent:
                    yield spent

            module.Phases.during = late

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


def failpoints(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Killed at every write, sync, rename and removal inside a save: a whole checkpoint remains."""
    from constrained_ft import checkpoint

    parts, config, target, folder = _trained(place, "failpoints")
    kept, point = folder.checkpoints, 0
    before = sorted(path.name for path in kept.iterdir())
    while True:
        trial = place / "failpoint"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(kept, trial)
        child = os.fork()
        if child == 0:
            _arm(point)
            checkpoint.save(trial, parts, config, target, {"iteration": 3.0})
            os._exit(0)
        _, how = os.waitpid(child, 0)
        newest, faults = checkpoint.newest(trial)
        require(newest is not None and not faults, f"failpoint {point}: {faults}")
        assert newest is not None
        require(newest.name in (before[-1], "iteration_0003"), f"failpoint {point}: {newest.name}")
        whole = [path for path in trial.glob("iteration_*") if checkpoint._fault(path) is None]
        require(len(whole) >= 2, f"failpoint {point}: {len(whole)} whole checkpoints")
        if os.waitstatus_to_exitcode(how) == 0:
            break
        point += 1
    print(
        f"failpoints: killed at each of {point} operations of a save; two whole checkpoints, and "
        "the newest is taken"
    )


def _trained(place: Path, name: str):
    """Parts, configuration and target after two iterations, and their folder, in this process."""
    from constrained_ft.checkpoint import continue_from_newest
    from constrained_ft.compose import compose
    from constrained_ft.distributed import StopRequest
    from constrained_ft.parts import build_parts
    from constrained_ft.progress import Silent
    from constrained_ft.run_folder import RunFolder
    from constrained_ft.train import train

    overrides = [one for one in SMALL if not one.startswith("constraint")]
    config = compose([*overrides, "trainer=overlapped", "trainer.iterations=2"])
    folder = RunFolder(place / name)
    if not folder.checkpoints.exists():
        folder.start(config, ["chaos"])
        train(config, folder, Silent(), StopRequest())
        folder.close()
    parts = build_parts(config, Silent(), StopRequest())
    _, target = continue_from_newest(parts, config, folder)
    return parts, config, target, folder


def _arm(point: int) -> None:
    """Kill this process at the point-th operation on files from now on."""
    import safetensors.torch

    seen = [0]

    def counted(call):
        def wrapped(*arguments, **named):
            if seen[0] == point:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            return call(*arguments, **named)

        return wrapped

    for owner, names in (
        (os, ("fsync", "unlink", "rmdir", "open")),
        (Path, ("mkdir", "replace", "write_text")),
        (shutil, ("rmtree",)),
        (safetensors.torch, ("save_file",)),
    ):
        for name in names:
            setattr(owner, name, counted(getattr(owner, name)))


def corrupt(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Damaged files are noticed before a step is taken, and the checkpoint before is taken."""
    from constrained_ft import checkpoint
    from constrained_ft.errors import CheckpointError

    parts, config, _, folder = _trained(place, "corrupt")
    chance, found = random.Random(3), Counter()
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    for number in range(count):
        trial = place / "corrupted"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(folder.checkpoints, trial)
        kind = _damage(trial / names[-1], chance)
        newest, faults = checkpoint.newest(trial)
        if newest is not None and newest.name == names[-1]:  # its manifest says that it is whole
            try:
                checkpoint.restore(newest, parts, config)
            except CheckpointError:
                found[kind] += 1
                continue
            raise Broken(f"corruption {number} ({kind}) was not noticed")
        require(newest is not None and newest.name == names[-2] and len(faults) == 1, str(faults))
        found[kind] += 1
    kinds_found = ", ".join(f"{number} x {kind}" for kind, number in sorted(found.items()))
    print(f"corrupt: {found.total()} of {count} noticed before a step ({kinds_found})")


def _damage(checkpoint: Path, chance: random.Random) -> str:
    """Do one of several kinds of harm to a checkpoint; returns its name."""
    import safetensors.torch

    from constrained_ft.checkpoint import _seal

    files = sorted(checkpoint.iterdir())
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    match chance.randrange(5):
        case 0 | 1:
            place = chance.randrange(len(content))
            content[place] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
            return "a flipped bit"
        case 2:
            file.write_bytes(content[: chance.randrange(len(content))])
            return "a file cut short"
        case 3:
            file.unlink()
            return "a missing file"
        case _:
            # A whole checkpoint of something else: the manifest fits, the tensors do not.
            chosen = checkpoint / chance.choice(["llm", "auxiliary"])
            chosen = chosen.with_suffix(".safetensors")
            tensors = safetensors.torch.load_file(chosen)
            name = chance.choice([n for n, t in tensors.items() if t.dim() > 0])
            import torch

            whole = tensors[name]
            tensors[name] = whole[:1].clone() if len(whole) > 1 else torch.cat([whole, whole])
            safetensors.torch.save_file(tensors, chosen)
            (checkpoint / "manifest.json").unlink()
            _seal(checkpoint)
            return "a tensor of another shape"


def soak(place: Path, count: int, kinds: Sequence[str]) -> None:
    """Memory and file descriptors over many iterations of the smoke experiment."""
    folder = place / "soak"
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "constrained_ft.cli.main", "train", "experiment=smoke"),
            *(f"output_dir={folder}", f"trainer.iterations={count}"),
        ],
        cwd=place,
        stdout=subprocess.DEVNULL,
    )
    rows: list[tuple[int, float, int]] = []
    while child.poll() is None:
        time.sleep(0.2)
        try:
            memory = Path(f"/proc/{child.pid}/status").read_text()
            files = len(list(Path(f"/proc/{child.pid}/fd").iterdir()))
            done = len((folder / "metrics.jsonl").read_text().splitlines())
            held = float(memory.partition("VmRSS:")[2].split()[0]) / 1024
        except (OSError, IndexError):  # not begun yet, or just ended
            continue
        if done > 20:
            rows.append((done, held, files))
    require(child.returncode == 0, f"exit code {child.returncode}")
    half = len(rows) // 2
    mean = sum(row[0] for row in rows) / len(rows), sum(row[1] for row in rows) / len(rows)
    slope = sum((r[0] - mean[0]) * (r[1] - mean[1]) for r in rows)
    slope /= sum((row[0] - mean[0]) ** 2 for row in rows)
    most = max(row[2] for row in rows[:half]), max(row[2] for row in rows[half:])
    print(
        f"soak: {count} iterations of smoke, memory grows by {slope:.3f} MB an iteration from the "
        f"21st on ({rows[0][1]:.0f} to {rows[-1][1]:.0f} MB), at most {most[0]} files open in the "
        f"first half and {most[1]} in the second"
    )
    require(slope <= 0.1, f"memory grows by {slope:.3f} MB an iteration")
    require(most[1] <= most[0], "more and more files are open")


SCENARIOS = {
    "kill": (kill, 20),
    "term": (term, 20),
    "boundaries": (boundaries, 8),
    "ranks": (ranks, 2),
    "sleeps": (sleeps, 50),
    "failpoints": (failpoints, 1),
    "corrupt": (corrupt, 500),
    "soak": (soak, 300),
}
SHORT = {"failpoints": 1, "corrupt": 60, "kill": 2, "term": 2, "ranks": 1}


def main() -> int:
    """Cause the trouble that is asked for; the exit code says whether every promise was kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[*SCENARIOS, "short", "all"])
    parser.add_argument("--count", type=int, help="how often")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind of run; all otherwise")
    arguments = parser.parse_args()
    chosen = (
        SHORT
        if arguments.what == "short"
        else {
            name: arguments.count or usual
            for name, (_, usual) in SCENARIOS.items()
            if arguments.what in (name, "all")
        }
    )
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    if arguments.what == "short":
        kinds = ["overlapped peers"]
    broken = 0
    print(f"on {socket.gethostname()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="cft-chaos-") as place:
        for name, count in chosen.items():
            begun = time.monotonic()
            try:
                SCENARIOS[name][0](Path(place), count, kinds)
            except Broken as error:
                print(f"{name}: BROKEN: {error}")
                broken += 1
            print(f"  {name} took {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
