"""Trouble with processes, for `chaos.py`: kills, signals, dead and frozen ranks, pauses, growth."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from chaos_runs import KINDS, Broken, Run, disturbed, require, undisturbed


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
    count = min(count, 2)
    for name in kinds:
        if KINDS[name][1] < 2:
            continue
        straight, expected = undisturbed(place, name, 10)
        for victim in range(2 - count, 2):
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
        for attempt in range(count):
            while again.iterations() < 2 * (attempt + 1):
                time.sleep(0.01)
            os.kill(int(str(again.record(attempt)["pid"])), signal.SIGKILL)
            time.sleep(1)
        code, said = again.wait()
        require(code == 0, f"{name}: {code} with --max-restarts:\n{said[-2000:]}")
        require(again.digest() == expected, f"{name}: other weights after restarts")
        print(f"ranks, {name}: {count} deaths under --max-restarts 3, the same to the bit")


def frozen(place: Path, count: int, kinds: Sequence[str]) -> None:
    """One rank freezes: the others leave and name it with its phase; continued, the same weights.

    Frozen is a stopped process, or one whose scorer holds the interpreter's lock.
    """
    for name in kinds:
        if KINDS[name][1] < 2:
            continue
        straight, expected = undisturbed(place, name, 10)
        # Of the ranks with a peer, the peer scores.
        holding = [1] if "placement=peers" in straight.overrides else [0, 1]
        cases = [
            *(("stopped", rank) for rank in range(2)),
            *(("holding", rank) for rank in holding),
        ]
        for how, victim in cases[:count]:
            run = disturbed(place, straight, f"frozen-{name.replace(' ', '-')}-{how}-{victim}")
            run.overrides = [*run.overrides, "placement.silence=3"]
            took, said = _freeze(run, how, victim)
            require("no sign of life" in said and f"rank {victim}" in said, f"{name}: {said}")
            print(
                f"frozen, {name}, {how}: all left after {took:.0f} s: {said.partition('; logs')[0]}"
            )
            run.finish()
            require(run.digest() == expected, f"{name}: other weights after rank {victim} froze")


def _freeze(run: Run, how: str, victim: int) -> tuple[float, str]:
    """Freeze a rank; seconds until all had left, and why the run ended, as it says itself."""
    order = run.folder.with_suffix(".frozen")
    before = run.log_lines()
    run.start(CHAOS_LATENCY="0.05", CHAOS_FROZEN=str(order))
    run.await_training(before=before)
    while run.iterations() < 2:
        require(run.child is not None and run.child.poll() is None, "ended early")
        time.sleep(0.01)
    if how == "stopped":
        os.kill(int(str(run.record(victim)["pid"])), signal.SIGSTOP)
    else:
        order.write_text(str(victim))
    sent = time.monotonic()
    code, said = run.wait()
    took = time.monotonic() - sent
    order.unlink(missing_ok=True)
    require(code == 1, f"exit code {code} after rank {victim} froze:\n{said[-2000:]}")
    require(not run.pids(), "processes are left")
    return took, str(run.status()["reason"])


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
