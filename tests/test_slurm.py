"""Runs on Slurm: the batch script, run by bash with stand-ins for Slurm's commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import SMALL
from test_launch import cft, rows

# Each says in calls.txt what it was asked.
STANDINS = {
    "scontrol": """
echo "scontrol $*" >> "$CALLS/calls.txt"
if [ "$1" = show ]; then printf '127.0.0.1\\nnode2\\n'; fi
""",
    "squeue": """
echo "${JOB_STATE:-RUNNING}"
""",
    # The job's number, and the script kept, as Slurm does.
    "sbatch": """
echo "sbatch $*" >> "$CALLS/calls.txt"
if [ -n "$REFUSE" ]; then echo "$REFUSE" >&2; exit 1; fi
cp "${!#}" "$CALLS/job.sh"
echo "4217;cluster"
""",
    # A task for each node; signals go to all, and the highest exit code comes back.
    "srun": """
echo "srun $*" >> "$CALLS/calls.txt"
while [ "$1" != bash ]; do
  case $1 in --ntasks=*) count=${1#*=} ;; esac
  shift
done
trap 'again=1; kill -USR1 $tasks' USR1
for ((node = 0; node < count; node++)); do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
worst=0
for task in $tasks; do
  again=1
  while [ -n "$again" ]; do again=; wait "$task"; code=$?; done
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
""",
    # In the place of the launcher: waits for USR1, then ends with the code that is asked for.
    "launcher": """
echo "launcher $*" >> "$CALLS/calls.txt"
trap 'exit 75' USR1
if [ -n "$ENDS_WITH" ]; then exit "$ENDS_WITH"; fi
touch "$CALLS/launched"
while true; do sleep 0.05; done
""",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bin/ of stand-ins that comes first in PATH."""
    (tmp_path / "bin").mkdir()
    for name, text in STANDINS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{text}")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path))
    for name, value in {
        "SLURM_JOB_ID": "4217",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def calls(cluster: Path) -> list[str]:
    return (cluster / "calls.txt").read_text().splitlines()


def script(cluster: Path, *arguments: str) -> Path:
    """What a dry run prints, with the stand-in in the place of the launcher."""
    shown = cft("train", *SMALL, "output_dir=my run", *arguments, "--dry-run", cwd=cluster)
    assert shown.returncode == 0, shown.stderr
    assert not (cluster / "my run").exists()
    assert not (cluster / "calls.txt").exists()
    file = cluster / "job.sh"
    real = f"{sys.executable} -m constrained_ft.cli.main"
    assert shown.stdout.count(real) == 1
    file.write_text(shown.stdout.replace(real, "launcher"))
    return file


def start(file: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        ["bash", str(file)],
        cwd=file.parent,
        env=dict(os.environ) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(file: Path, job: "subprocess.Popen[str]") -> None:
    for _ in range(1500):
        if file.exists():
            return
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"{file} never came")


def test_a_dry_run_prints_a_script_for_every_node(cluster: Path) -> None:
    asked = "--time=4:00:00 -p gpu --comment 'two words'"
    file = script(cluster, "--slurm", asked, "--nnodes", "2", "--nproc-per-node", "8")
    lines = file.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--requeue", "--signal=B:USR1@180"} < set(options)
    assert f"--output='{cluster}/my run/slurm/%j.log'" in options
    assert options[-3:] == ["--time=4:00:00", "-p gpu", "--comment 'two words'"]
    job = start(file, ENDS_WITH="0")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    run = f"--config {cluster}/my run/slurm/config.yaml --resume auto output_dir={cluster}/my run"
    launchers = sorted(line for line in calls(cluster) if line.startswith("launcher"))
    assert launchers == [
        f"launcher train --nnodes 2 --node-rank {rank} --rdzv-endpoint 127.0.0.1:14217 {run} "
        "--nproc-per-node 8"
        for rank in (0, 1)
    ]
    assert not any("requeue" in line for line in calls(cluster))


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, 0),
        ({"JOB_STATE": "COMPLETING"}, 75),  # scancel: it is not to come back
        ({"SLURM_RESTART_COUNT": "3"}, 75),  # no iteration fits into a start
    ],
)
def test_ahead_of_the_time_limit_the_run_stops_and_the_job_is_requeued(
    environment: dict[str, str], code: int, cluster: Path
) -> None:
    job = start(script(cluster, "--slurm", "--time=1:00:00"), **environment)
    wait_for(cluster / "launched", job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code, said
    assert ("scontrol requeue 4217" in calls(cluster)) is (code == 0)


@pytest.mark.parametrize("code", ["2", "4"])
def test_a_run_that_failed_is_not_started_again(code: str, cluster: Path) -> None:
    job = start(script(cluster, "--slurm", ""), ENDS_WITH=code)
    job.communicate(timeout=60)
    assert job.returncode == int(code)
    assert not any("requeue" in line for line in calls(cluster))


def test_terminating_the_job_sends_no_second_signal_to_the_run(cluster: Path) -> None:
    job = start(script(cluster, "--slurm", ""))
    wait_for(cluster / "launched", job)
    job.send_signal(signal.SIGTERM)  # Slurm sends it to the launchers itself
    time.sleep(0.5)
    assert job.poll() is None
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert "scontrol requeue 4217" in calls(cluster)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slurm", "4:00:00"), "must be options of sbatch"),
        (("--slurm", "--nodes=2"), "--nnodes N says how many nodes"),
        (("--slurm", "", "--node-rank", "1"), "finds out ranks and endpoint itself"),
        (("--slurm", "", "-m"), "-m hydra/launcher=submitit_slurm"),
        (("--slurm", "", "--clean"), "takes no --clean"),
        (("--slurm", "", "placement=peers", "--nproc-per-node", "1"), "needs 2 processes or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    arguments: tuple[str, ...], message: str, cluster: Path
) -> None:
    ran = cft("train", *SMALL, "output_dir=run", *arguments, cwd=cluster)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert not (cluster / "run").exists()


def test_what_slurm_refuses_is_said(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSE", "Batch job submission failed: Invalid account")
    ran = cft("train", *SMALL, "output_dir=run", "--slurm", "--account=none", cwd=cluster)
    assert ran.returncode == 2
    assert "Invalid account" in ran.stderr


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_submitted_run_is_stopped_requeued_and_finished(cluster: Path) -> None:
    many = ("trainer.iterations=4", "--nnodes", "2", "--nproc-per-node", "1")
    ran = cft("train", *SMALL, "output_dir=run", "--slurm", "--time=1", *many, cwd=cluster)
    assert ran.returncode == 0, ran.stderr
    assert "job 4217: run" in ran.stdout
    file, status = cluster / "job.sh", cluster / "run" / "status.json"
    job = start(file)
    wait_for(cluster / "run" / "checkpoints" / "iteration_0001", job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=150)
    assert "scontrol requeue 4217" in calls(cluster), said
    assert json.loads(status.read_text())["state"] == "interrupted"
    job = start(file, SLURM_RESTART_COUNT="1")
    said, _ = job.communicate(timeout=150)
    assert job.returncode == 0, said
    assert json.loads(status.read_text())["attempt"] == 2
    assert [row["iteration"] for row in rows(cluster / "run")] == [1, 2, 3, 4]
