"""The run folder: who may write to it, what it records, and when it is refused."""

import shlex
from pathlib import Path

import pytest

from constrained_ft import metrics
from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.errors import ConfigError
from constrained_ft.run_folder import RunFolder, newest_unfinished, write_atomically

COMMAND = ["cft", "train", "experiment=smoke", "data.path=my file.txt"]


def config_in(folder: Path, *overrides: str) -> Config:
    return compose(["experiment=smoke", f"output_dir={folder}", *overrides])


def started(path: Path, *overrides: str) -> RunFolder:
    folder = RunFolder(path)
    folder.start(config_in(path, *overrides), COMMAND)
    return folder


def test_a_start_writes_what_is_needed_to_get_the_run_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    folder = started(path)
    assert folder.config() == config_in(path)
    script = folder.command_file.read_text()
    assert shlex.join(COMMAND) in script
    assert str(Path.cwd()) in script
    environment = folder.environment()
    assert environment["seed"] == 0
    assert environment["versions"]["torch"]
    assert environment["versions"]["constrained-ft"]
    assert folder.status() | {"state": "running", "iteration": 0, "attempt": 1} == folder.status()
    hidden = [file.name for file in path.iterdir() if file.name.startswith(".")]
    assert hidden == [".lock"]


def test_the_paths_are_those_that_users_are_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = {
        folder.config_file: "config.yaml",
        folder.metrics_file: "metrics.jsonl",
        folder.evaluation_file: "evaluation.json",
        folder.phases_file: "phases.json",
        folder.rollouts_file(1): "rollouts/iteration_0001.jsonl",
        folder.samples_file(12): "samples/iteration_0012.jsonl",
        folder.checkpoint(3): "checkpoints/iteration_0003",
        folder.logs(): "logs/attempt_1",
        folder.final_llm: "final/llm",
        folder.final_adapter: "final/adapter",
        folder.final_auxiliary: "final/auxiliary",
    }
    assert {path.relative_to(tmp_path).as_posix() for path in names} == set(names.values())


def test_a_folder_that_holds_a_run_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.write_status("failed", iteration=2, exit_code=1)
    folder.close()
    with pytest.raises(ConfigError, match=r"failed, 2 iterations done.*--resume .*--clean"):
        started(tmp_path)
    assert folder.status()["iteration"] == 2
    assert not folder.is_running()


def test_clean_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.write_status("finished", iteration=4)
    folder.checkpoint(4).mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    folder.close()
    again = RunFolder(tmp_path)
    again.start(config_in(tmp_path), COMMAND, clean=True)
    assert not again.checkpoints.exists()
    assert again.status()["iteration"] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_never_trained_is_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.write_status("failed", reason="there is no file corpus.jsonl", exit_code=3)
    folder.close()
    again = started(tmp_path, "seed=2")
    assert again.config().seed == 2
    assert again.status()["reason"] is None


def test_only_one_process_writes_to_a_folder(tmp_path: Path) -> None:
    folder = started(tmp_path)
    with pytest.raises(ConfigError, match="is writing to"):
        RunFolder(tmp_path).start(config_in(tmp_path), COMMAND, clean=True)
    with pytest.raises(ConfigError, match="is writing to"):
        RunFolder(tmp_path).resume(config_in(tmp_path), COMMAND)
    assert RunFolder(tmp_path).is_running()
    folder.close()
    assert not RunFolder(tmp_path).is_running()


def test_resume_keeps_the_record_and_counts_attempts(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.write_status("interrupted", iteration=2, last_checkpoint="iteration_0002", exit_code=75)
    folder.add_environment({"device": "cpu"})
    folder.close()
    again = RunFolder(tmp_path)
    again.resume(config_in(tmp_path, "output_dir=elsewhere"), ["cft", "train", "--resume", "auto"])
    status = again.status()
    assert (status["attempt"], status["iteration"], status["state"]) == (2, 2, "running")
    assert status["exit_code"] is None
    assert "--resume auto" in again.command_file.read_text().splitlines()[-1]
    assert again.environment()["earlier_attempts"][0]["device"] == "cpu"
    assert again.logs().name == "attempt_2"


def test_resume_with_another_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    folder = started(tmp_path)
    folder.close()
    other = config_in(tmp_path, "trainer.kl_weight=5")
    with pytest.raises(ConfigError, match=r"trainer\.kl_weight: 100\.0 there, 5\.0 here"):
        RunFolder(tmp_path).resume(other, COMMAND)


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder(tmp_path).resume(config_in(tmp_path), COMMAND)


def test_the_newest_unfinished_run_of_the_same_configuration_is_found(tmp_path: Path) -> None:
    def run(name: str, state: str, begun: str, *overrides: str) -> None:
        folder = started(tmp_path / name, *overrides)
        folder.write_status(state, started=begun)
        folder.close()

    config = config_in(tmp_path / "new")
    assert newest_unfinished(tmp_path / "nowhere", config) is None
    run("older", "interrupted", "2026-01-01")
    run("newer", "failed", "2026-01-02")
    run("done", "finished", "2026-01-03")
    run("stopped_by_a_guard", "diverged", "2026-01-03")
    run("another", "interrupted", "2026-01-04", "seed=5")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "status.json").write_text('{"state": "failed"}')
    found = newest_unfinished(tmp_path, config)
    assert found is not None
    assert found.path.name == "newer"
    busy = RunFolder(tmp_path / "newer")
    busy.resume(config, COMMAND)
    found = newest_unfinished(tmp_path, config)
    assert found is not None
    assert found.path.name == "older"


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir="):
        started(tmp_path / "file")
    with pytest.raises(ConfigError, match="output_dir="):
        started(tmp_path / "file" / "below")


def test_a_damaged_status_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(ConfigError, match=r"status\.json cannot be read"):
        RunFolder(tmp_path).status()


def test_a_write_that_fails_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_half_a_row_that_a_full_disk_left_is_not_read_and_gives_way(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics.append(file, {"iteration": 1.0})
    with file.open("a") as stream:
        stream.write('{"iteration": 2.0, "upda')
    assert metrics.read(file) == [{"iteration": 1.0}]
    metrics.append(file, {"iteration": 2.0})
    assert metrics.read(file) == [{"iteration": 1.0}, {"iteration": 2.0}]
