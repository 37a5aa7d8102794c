"""`cft runs`: what is listed, what one run says, and what may go."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from shell import Cft

from constrained_ft.compose import compose
from constrained_ft.errors import ConfigError
from constrained_ft.run_folder import RunFolder
from constrained_ft.runs import find_runs

SMOKE = compose(["experiment=smoke"])
EVALUATION = {
    "models": [
        {
            "model": name,
            "groups": {"corpus": {"samples": 8, "satisfaction": share}},
            "perplexity": {"corpus": {"mean": perplexity}},
        }
        for name, share, perplexity in (
            ("base", {"mean": 0.5, "low": 0.4, "high": 0.6}, 40.0),
            ("tuned", {"mean": 0.875, "low": 0.8, "high": 0.9}, 20.0),
        )
    ]
}


def make(path: Path, state: str, *, days: float = 0, iteration: int = 2) -> RunFolder:
    """A run folder as a run of so many days ago left it."""
    folder = RunFolder(path).start(
        SMOKE.model_copy(update={"output_dir": str(path)}), ["cft", "train", "experiment=smoke"]
    )
    folder.close()
    status = folder.status()
    when = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    status |= {"state": state, "iteration": iteration, "started": when, "updated": when}
    folder.status_file.write_text(json.dumps(status))
    folder.metrics_file.write_text('{"iteration": 2, "rollouts/satisfaction": 0.75}\n')
    if state == "finished":
        folder.evaluation_file.write_text(json.dumps(EVALUATION))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four runs: three single ones and a job of a sweep."""
    make(tmp_path / "outputs/new", "interrupted", days=1)
    make(tmp_path / "outputs/old", "failed", days=9)
    make(tmp_path / "outputs/done", "finished", days=5, iteration=4)
    make(tmp_path / "multirun/smoke/0", "finished", days=20, iteration=4)
    return tmp_path


def names(text: str) -> list[str]:
    """The runs that a table names, in its order."""
    words = [line.split()[0] for line in text.splitlines() if line.strip()]
    return [word for word in words if word.startswith(("outputs/", "multirun/"))]


def test_list_shows_the_newest_first_with_state_and_results(cft: Cft, runs: Path) -> None:
    ran = cft("runs", "list")
    assert ran.code == 0
    order = ["outputs/new", "outputs/done", "outputs/old", "multirun/smoke/0"]
    assert names(ran.out) == order
    words = " ".join(ran.out.split())
    assert "outputs/new interrupted 2/4" in words
    assert "finished 4/4" in words
    assert "87.5 % 20.00" in words
    assert "cft train --resume outputs/new" in words
    assert names(cft("runs", "list", "multirun").out) == ["multirun/smoke/0"]


def test_list_of_nothing_says_how_to_begin(cft: Cft) -> None:
    ran = cft("runs", "list")
    assert ran.code == 0
    assert "cft train" in ran.out
    assert cft("runs", "list", "nowhere").code == 2


def test_a_run_whose_process_is_gone_died_and_one_that_is_locked_is_running(
    cft: Cft, tmp_path: Path
) -> None:
    make(tmp_path / "outputs/gone", "running")
    assert "died" in cft("runs", "list").out
    with holding(tmp_path / "outputs/gone") as other:
        assert find_runs([tmp_path / "outputs"])[0].state == "running"
        assert "running" in cft("runs", "list").out
        other.communicate("\n")
    assert find_runs([tmp_path / "outputs"])[0].state == "died"


def holding(path: Path) -> "subprocess.Popen[str]":
    """Another process that writes to a run folder until a line is sent to it."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from constrained_ft.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\nfolder._take()\n"
        "print('held', flush=True)\nsys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_show_tells_one_run_and_what_to_do_with_it(cft: Cft, runs: Path) -> None:
    out = " ".join(cft("runs", "show", "outputs/done").out.split())
    for part in (
        "state finished",
        "iterations 4/4",
        "command cft train experiment=smoke",
        "satisfaction 0.750",
        "corpus, satisfied 50.0 % (40.0–60.0) 87.5 % (80.0–90.0)",
        "perplexity, corpus 40.00 20.00",
        "cft generate outputs/done",
    ):
        assert part in out
    assert "cft train --resume outputs/old" in cft("runs", "show", "outputs/old").out
    ran = cft("runs", "show", "nowhere")
    assert ran.code == 2
    assert "cft runs list" in ran.err


@pytest.mark.parametrize(
    ("options", "going"),
    [
        (["--unfinished"], ["outputs/new", "outputs/old"]),
        (["--older-than", "3"], ["outputs/done", "outputs/old", "multirun/smoke/0"]),
        (["--keep", "2"], ["outputs/old", "multirun/smoke/0"]),
        (["--unfinished", "--older-than", "3"], ["outputs/old"]),
        (["--keep", "0", "--older-than", "15"], ["multirun/smoke/0"]),
        (["--keep", "4"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_prune_shows_what_may_go_and_deletes_it_with_yes_alone(
    cft: Cft, runs: Path, options: list[str], going: list[str]
) -> None:
    everything = {run.folder.path for run in find_runs([runs])}
    ran = cft("runs", "prune", *options)
    assert ran.code == 0
    assert names(ran.out) == going
    assert {run.folder.path for run in find_runs([runs])} == everything
    if going:
        assert "add --yes" in ran.out
    cft("runs", "prune", *options, "--yes")
    left = {run.folder.path for run in find_runs([runs])}
    assert left == everything - {runs / name for name in going}
    assert not any((runs / name).exists() for name in going)


def test_prune_leaves_a_running_run_and_files_of_others(cft: Cft, tmp_path: Path) -> None:
    make(tmp_path / "outputs/running", "running")
    make(tmp_path / "outputs/mine", "failed")
    (tmp_path / "outputs/mine/notes.txt").write_text("mine")
    with holding(tmp_path / "outputs/running") as other:
        assert cft("runs", "prune", "--keep", "0", "--yes").code == 0
        assert (tmp_path / "outputs/running/config.yaml").exists()
        with pytest.raises(ConfigError, match="is writing to"):
            RunFolder(tmp_path / "outputs/running").delete()
        other.communicate("\n")
    assert [file.name for file in (tmp_path / "outputs/mine").iterdir()] == ["notes.txt"]


def test_prune_wants_to_be_told_which(cft: Cft, runs: Path) -> None:
    ran = cft("runs", "prune", "--yes")
    assert ran.code == 2
    assert "--unfinished" in ran.err
    assert len(find_runs([runs])) == 4


def test_broken_files_do_not_hide_the_other_runs(cft: Cft, runs: Path) -> None:
    (runs / "outputs/old/status.json").write_text("{")
    (runs / "outputs/done/evaluation.json").write_text("{}")
    (runs / "outputs/new/config.yaml").unlink()
    ran = cft("runs", "list")
    assert ran.code == 0
    assert len(names(ran.out)) == 4
    assert "unreadable" in ran.out
    assert "2/?" in ran.out
    for name in ("old", "done", "new"):
        assert cft("runs", "show", f"outputs/{name}").code == 0


def test_nothing_of_it_loads_torch(runs: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from constrained_ft.runs import find_runs, results\n"
        "found = find_runs([Path('.')])\n"
        "results(next(run for run in found if run.is_finished).folder)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=runs, check=True)
