"""Runs of several processes, as a user starts them: what is launched, what comes of it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import SMALL, small_config

from constrained_ft.cli.launch import Request, _processes
from constrained_ft.cli.settings import settings
from constrained_ft.cli.torchrun import Processes
from constrained_ft.cli.worker import Orders
from constrained_ft.errors import ConfigError

ROOT = Path(__file__).parents[1]
SECRET = "canary-3f9c1e"
ORDERS = Orders(folder="run", attempt=1, quiet=False, verbose=False, color=True, debug=False)


def cft(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "API_KEY": SECRET}
    return subprocess.run(
        [sys.executable, "-m", "constrained_ft.cli.main", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all weights that a run ends with."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    files = [*(folder / "final").rglob("*.safetensors"), *newest.glob("*.safetensors")]
    assert len(files) > 5
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What is launched --------------------------------------------------------------------------------


def test_one_machine_meets_on_a_port_of_its_own() -> None:
    command = Processes(per_node=2, extra=("--max-restarts", "3")).command(ORDERS)
    assert command[:5] == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
    ]
    assert command[5:8] == ["2", "--max-restarts", "3"]
    assert command[8:10] == ["-m", "constrained_ft.cli.worker"]
    assert Orders(**json.loads(command[10])) == ORDERS


def test_several_machines_meet_where_they_are_told() -> None:
    processes = _processes("4", 2, 1, "10.0.0.1:29500")
    command = " ".join(processes.command(ORDERS))
    assert (
        "--rdzv-backend static --rdzv-endpoint 10.0.0.1:29500 --nnodes 2 --node-rank 1" in command
    )
    assert "--standalone" not in command
    assert processes.total == 8


def test_on_one_machine_torchrun_restarts() -> None:
    command = " ".join(_processes("2", 1, 0, None, 3).command(ORDERS))
    assert "--standalone --max-restarts 3 --nproc-per-node 2" in command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("two", 1, 0, None), "must be auto or a number"),
        (("2", 2, 0, None), "belong together"),
        (("2", 1, 0, "host:1"), "belong together"),
        (("2", 2, 2, "host:1"), "must be below --nnodes 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    given: tuple[str, int, int, str | None], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _processes(*given)


@pytest.mark.parametrize("count", ["0", "1"])
def test_no_process_and_one_process_run_here(count: str) -> None:
    assert _processes(count, 1, 0, None).total == 1


def test_peers_have_to_leave_somebody_who_updates() -> None:
    config = small_config("placement=peers", "placement.peers=2")
    with pytest.raises(ConfigError, match=r"needs 3 processes or more, and 2 would start"):
        Processes(per_node=2).check(config)
    Processes(per_node=3).check(config)


def test_a_sweeps_jobs_are_started_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "torchrun", ("--max-restarts", "1"))
    request = Request(
        overrides=(),
        config_file=None,
        config_dirs=(),
        processes=_processes("2", 1, 0, None),
        nproc="2",
    )
    assert request.options() == [
        *("--nproc-per-node", "2", "--resume", "none", "--", "--max-restarts", "1")
    ]


# What comes of it --------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["fresh", "matched"])
def test_peers_give_what_one_process_gives_to_the_last_bit(reference: str, tmp_path: Path) -> None:
    overrides = (*SMALL, "trainer=overlapped", f"trainer.reference={reference}")
    alone = cft("train", *overrides, "output_dir=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    peers = cft(
        *("train", *overrides, "placement=peers", "output_dir=peers", "--nproc-per-node", "2"),
        cwd=tmp_path,
    )
    assert peers.returncode == 0, peers.stderr
    assert digests(tmp_path / "peers") == digests(tmp_path / "alone")
    triples = [
        (row["target/lag"], row["version/llm"], row["version/auxiliary"], row["version/data"])
        for row in rows(tmp_path / "peers")
    ]
    assert triples == [(0, 0, 1, 1), (1, 1, 1, 1), (1, 2, 2, 2)]
    assert rows(tmp_path / "peers")[0]["time/wait_target"] > 0
    logs = tmp_path / "peers" / "logs" / "attempt_1"
    assert "waiting for the LLM" in (logs / "rank_1.log").read_text()
    assert "waiting for targets" in peers.stdout
    assert not peers.stderr


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    constant = ("trainer.lr_scheduler=constant",)
    for name, iterations in (("straight", 3), ("begun", 2)):
        ran = cft(
            *("train", *SMALL, *constant, f"trainer.iterations={iterations}"),
            f"output_dir={name}",
            cwd=tmp_path,
        )
        assert ran.returncode == 0, ran.stderr
    half = small_config().trainer.per_device_train_batch_size // 2
    forked = cft(
        *("train", "--resume", "begun", "--fork", "trainer.iterations=3", "output_dir=forked"),
        *(f"trainer.per_device_train_batch_size={half}", "--nproc-per-node", "2"),
        cwd=tmp_path,
    )
    assert forked.returncode == 0, forked.stderr
    assert "the number of processes was 1 and is 2" in forked.stdout
    ours, theirs = rows(tmp_path / "forked"), rows(tmp_path / "straight")
    assert [row["iteration"] for row in ours] == [1, 2, 3]
    for name in ("update/ce", "update/kl", "rollouts/entropy", "auxiliary/log_loss"):
        assert ours[2][name] == pytest.approx(theirs[2][name], rel=1e-3), name
    samples = [
        (tmp_path / run / "rollouts" / "iteration_0003.jsonl").read_text().splitlines()
        for run in ("forked", "straight")
    ]
    assert samples[0] == samples[1]


def test_what_a_rank_cannot_do_ends_all_with_its_exit_code(tmp_path: Path) -> None:
    scorer = tmp_path / "broken.py"
    scorer.write_text(
        "import os\n"
        "def score(prompts, completions):\n"
        "    if os.environ.get('RANK') == '1' and len(completions) > 2:\n"
        "        return [2.0] * len(completions)\n"
        "    return [float('a' not in text) for text in completions]\n"
    )
    ran = cft(
        *("train", *SMALL, "constraint=function", f"constraint.scorer.path={scorer}:score"),
        *("output_dir=run", "--nproc-per-node", "2"),
        cwd=tmp_path,
    )
    assert ran.returncode == 3
    assert "error: before training: the scorer" in ran.stderr
    assert "gave no score for 20 of 40 completions" in ran.stderr
    assert "a score must lie in [0, 1]" in ran.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 8
    for text in (ran.stdout, ran.stderr, *(file.read_bytes().decode("latin-1") for file in files)):
        assert SECRET not in text


def test_peers_without_processes_are_refused_before_anything_starts(tmp_path: Path) -> None:
    ran = cft("train", *SMALL, "placement=peers", "output_dir=run", cwd=tmp_path)
    assert ran.returncode == 2
    assert "give --nproc-per-node 2, or placement=inline" in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(1200)  # a single run that hangs is named by the script, after 600 s
def test_trouble_of_every_kind_loses_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos.py"), "short"],
        capture_output=True,
        text=True,
        timeout=1180,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for kind in ("failpoints", "full", "corrupt", "kill", "term", "ranks"):
        assert f"\n{kind}" in ran.stdout
