"""The comparison: scenarios, methods, seeds; every run, every measurement, one page.

    python scripts/reproduce.py run outputs/comparison          # hours; goes on where it stopped
    python scripts/reproduce.py run outputs/comparison --only toxic/cft
    python scripts/reproduce.py list outputs/comparison         # cells, their commands and state
    python scripts/reproduce.py again outputs/again --only toxic/cft/0    # measured cells once more
    python scripts/reproduce.py render                          # docs/results.md from the file

What was measured is added to docs/results.jsonl with its commands, commit and machine; a cell whose
commands stand there is not done again, so that the comparison can be made in several parts, on
several machines. Interrupted runs go on from their newest checkpoint. The cells are in
comparison.py, the page in comparison_page.py.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import comparison
from comparison import EXTRAS, Cell, cells, extra_command, recorded, state
from comparison_page import render

from constrained_ft import metrics

CFT = [sys.executable, "-m", "constrained_ft.cli.main"]


def run(root: Path, only: str, deadline: float) -> None:
    """Train and measure what is missing, one cell after the other."""
    done = recorded()
    for cell in cells():
        if only in cell.name and cell.name not in done and time.monotonic() < deadline:
            _run_cell(cell, root)
    for name, of_runs in EXTRAS.items():
        trained = all(Cell.is_trained(cell, root) for cell in of_runs)
        if only in name and name not in done and trained and time.monotonic() < deadline:
            output = root / f"{name}.json"
            if output.exists() or _cft(extra_command(name, root), root / name):
                command = f"cft {shlex.join(extra_command(name, Path('comparison')))}"
                _record(name, [command], output, root / of_runs[-1].name)


def again(root: Path, only: str, deadline: float) -> None:
    """Train and measure once more what has been measured, each cell once in a folder."""
    done = recorded()
    for cell in cells():
        fresh = not (root / cell.name / "measured.json").exists()
        if only in cell.name and cell.name in done and fresh and time.monotonic() < deadline:
            _run_cell(cell, root)


def _run_cell(cell: Cell, root: Path) -> None:
    folder = root / cell.name
    if not cell.is_trained(root):
        begun = (folder / "config.yaml").exists()
        if not _cft(["train", "--resume", str(folder)] if begun else cell.train(root), folder):
            return
    if (folder / "measured.json").exists() or _cft(cell.measure(root), folder):
        _record(cell.name, cell.commands(), folder / "measured.json", folder)


def _record(name: str, commands: list[str], measured: Path, run: Path) -> None:
    """Add what was measured to the file, with what the run says of its making."""
    tree = json.loads(measured.read_text(encoding="utf-8"))
    made = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    phases = json.loads((run / "phases.json").read_text(encoding="utf-8"))["phases"]
    spent = metrics.cost(metrics.read(run / "metrics.jsonl"))
    spent["sampling"] = phases.get("sampling", {}).get("seconds", 0.0)
    row = {
        "name": name,
        "commands": commands,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": made["git_revision"],
        "machine": f"{made['processor']}, OMP_NUM_THREADS={made['threads']}, "
        f"torch {made['versions']['torch']}",
        "spent": {key.removeprefix("budget/"): round(value, 1) for key, value in spent.items()},
        "models": [_rounded(model) for model in tree["models"]],
        "differences": [
            _rounded(one) for one in tree["differences"] if one["measure"] == "benchmarks"
        ],
    }
    with comparison.RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    """Four digits after the point: far below every interval."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _cft(arguments: Sequence[str], folder: Path) -> bool:
    """Run one command; what it prints goes beside the run's folder."""
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        code = subprocess.call([*CFT, *arguments], stdout=out, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - started
    print(f"exit {code} after {seconds:.0f} s: cft {shlex.join(arguments)}", flush=True)
    return code == 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("run", "list", "again", "render"))
    parser.add_argument("root", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none later")
    given = parser.parse_args()
    if given.what == "render":
        render()
        return
    if given.root is None:
        parser.error(f"{given.what} needs the folder of the runs")
    if given.what in ("run", "again"):
        work = run if given.what == "run" else again
        work(given.root, given.only, time.monotonic() + 60 * given.minutes)
        return
    done = recorded()
    for cell in cells():
        if given.only in cell.name:
            said = "measured" if cell.name in done else state(given.root / cell.name)
            print(f"{cell.name}: {said}\n  cft {shlex.join(cell.train(given.root))}")


if __name__ == "__main__":
    main()
