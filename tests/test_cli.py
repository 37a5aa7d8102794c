"""The command line: arguments, exit codes, run folders, sweeps and what is printed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import test_front as front_tests
import yaml
from rich.console import Console
from shell import Cft

from constrained_ft.cli import job as job_module
from constrained_ft.cli.display import PlainDisplay, TerminalDisplay, clean, make_display
from constrained_ft.compose import load_config
from constrained_ft.config import Config
from constrained_ft.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
    ModelError,
    ScorerError,
)
from constrained_ft.run_folder import RunFolder
from constrained_ft.sweep_folder import SweepFolder


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Put a function in the place of `train`, and of the module that knows torch."""

    def install(train: Callable[..., object]) -> None:
        class StopRequest:
            def install(self) -> None:
                pass

        fakes = {"train": {"train": train}, "distributed": {"StopRequest": StopRequest}}
        for name, members in fakes.items():
            module = ModuleType(f"constrained_ft.{name}")
            for member, value in members.items():
                setattr(module, member, value)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def fails_with(error: BaseException) -> Callable[..., object]:
    def train(config: object, folder: RunFolder, *rest: object) -> None:
        folder.write_status("running", iteration=1, last_checkpoint="iteration_0001")
        raise error

    return train


def succeeds(config: object, folder: RunFolder, display: PlainDisplay, stop: object) -> None:
    display.phase("sampling", 8)
    display.advance(8, satisfaction=0.5)
    folder.write_status("running", iteration=4, last_checkpoint="iteration_0004")
    display.iteration(4, 4, {"update/ce": 3.0})
    display.table("held-out prompts", ["", "base"], [["satisfied", "0.9"]])


# --- starting up --------------------------------------------------------------------------------


LIBRARIES = "import pydantic, rich.console, rich.text, typer.main, yaml; pydantic.BaseModel"
LIBRARIES_SECONDS = 0.15  # where half a second is asked for; slower machines get as much more


def cpu_seconds(code: str) -> float:
    code = f"import time\n{code}\nprint('CPU seconds', time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.rsplit(maxsplit=1)[1])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "list"]])
def test_help_loads_no_torch_and_takes_half_a_second(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from constrained_ft.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    rounds = [(cpu_seconds(code), cpu_seconds(LIBRARIES)) for _ in range(5)]
    ours, libraries = map(min, zip(*rounds, strict=True))
    assert ours <= 0.5 * max(1.0, libraries / LIBRARIES_SECONDS), rounds


def test_version(cft: Cft) -> None:
    assert re.fullmatch(r"cft \d+\.\d+\.\d+\n", cft("--version").out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["train", "--nonsense"],
        ["train", "trainer.lrr=1"],
        ["train", "trainer.iterations=0", "--dry-run"],
        ["train", "--config", "nowhere.yaml"],
        ["train", "--config-dir", "nowhere"],
        ["train", "--clean", "--resume", "auto"],
        ["train", "--resume", "nowhere"],
        ["train", "-m", "seed=0,-1"],
        ["train", "-m", "output_dir=x"],
        ["generate", "model"],
        ["generate", "model", "--prompt", "a", "--prompts", "b"],
        ["generate", "model", "--prompt", "a", "--n", "0"],
        ["evaluate"],
        ["config", "validate", "nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_usage_and_configuration_errors_are_2_and_start_nothing(
    cft: Cft, tmp_path: Path, arguments: list[str]
) -> None:
    ran = cft(*arguments)
    assert ran.code == 2
    assert ran.err
    assert "Traceback" not in ran.err
    assert not [*tmp_path.iterdir()]


def test_an_error_is_one_line_on_standard_error(cft: Cft) -> None:
    ran = cft("train", "trainer.kl_wieght=1")
    assert ran.out == ""
    assert ran.err == "error: unknown key trainer.kl_wieght; did you mean trainer.kl_weight?\n"


def test_debug_shows_the_traceback_too(cft: Cft) -> None:
    ran = cft("--debug", "train", "trainer.kl_wieght=1")
    assert "Traceback" in ran.err
    assert ran.code == 2


# --- train --------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_run_and_writes_nothing(cft: Cft, tmp_path: Path) -> None:
    ran = cft("train", "experiment=smoke", "--dry-run", "trainer=overlapped")
    assert ran.code == 0
    for part in ("tiny:llama", "letters", "overlapped, 4 iterations x 32 = 128 steps", "outputs/"):
        assert part in ran.out
    assert not [*tmp_path.iterdir()]


def test_a_run_leaves_its_record(cft: Cft, training: Callable[..., None], tmp_path: Path) -> None:
    training(succeeds)
    ran = cft("train", "experiment=smoke", "output_dir=run")
    assert ran.code == 0
    assert "iteration 4 of 4 done: ce 3.000" in ran.out
    assert "satisfied" in ran.out
    folder = RunFolder(tmp_path / "run")
    status = folder.status()
    assert (status["state"], status["exit_code"], status["iteration"]) == ("finished", 0, 4)
    assert "cft train experiment=smoke output_dir=run" in folder.command_file.read_text()
    assert not folder.is_running()


def test_the_script_in_the_folder_is_the_command(
    cft: Cft, training: Callable[..., None], tmp_path: Path
) -> None:
    training(succeeds)
    cft("train", "experiment=smoke", "output_dir=run", "data.path=my corpus.txt")
    script = RunFolder(tmp_path / "run").command_file.read_text().replace("exec ", "")
    shown = script.replace("cft train", "printf '%s\\n'")
    words = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines()[-1] == "data.path=my corpus.txt"


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (DataError("there is no corpus"), 3, "failed"),
        (ModelError("there is no model"), 3, "failed"),
        (ScorerError("no score"), 3, "failed"),
        (CheckpointError("disk full"), 3, "failed"),
        (DivergedError("KL above the limit"), 4, "diverged"),
        (Interrupted("stopped by SIGTERM"), 75, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("a bug"), 1, "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_outcome_has_its_exit_code_and_status(
    cft: Cft,
    training: Callable[..., None],
    tmp_path: Path,
    error: BaseException,
    code: int,
    state: str,
) -> None:
    training(fails_with(error))
    ran = cft("train", "experiment=smoke", "output_dir=run")
    assert ran.code == code
    assert "Traceback" not in ran.err
    status = RunFolder(tmp_path / "run").status()
    assert (status["state"], status["exit_code"]) == (state, code)
    assert (status["iteration"], status["last_checkpoint"]) == (1, "iteration_0001")
    assert str(error).split(";")[0] in status["reason"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "", "run/metrics.jsonl"), "run/metrics.jsonl cannot be used: No space left"),
        (OSError(30, ""), "a file cannot be used: Read-only file system"),
        (ValueError("I/O error: no (os error 28)"), "a file cannot be used: No space left"),
    ],
)
def test_a_full_disk_is_no_bug(
    cft: Cft, training: Callable[..., None], tmp_path: Path, error: Exception, words: str
) -> None:
    training(fails_with(error))
    ran = cft("train", "experiment=smoke", "output_dir=run")
    assert ran.code == 3
    assert words in ran.err
    assert "unexpected" not in ran.err
    status = RunFolder(tmp_path / "run").status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert words in status["reason"]


def test_an_interrupted_run_says_how_to_continue(cft: Cft, training: Callable[..., None]) -> None:
    training(fails_with(Interrupted("stopped by SIGINT")))
    assert "`cft train --resume run` continues" in cft("train", "output_dir=run").err


def test_the_traceback_of_a_bug_is_kept(
    cft: Cft, training: Callable[..., None], tmp_path: Path
) -> None:
    training(fails_with(RuntimeError("a bug")))
    ran = cft("train", "experiment=smoke", "output_dir=run")
    assert "unexpected RuntimeError: a bug" in ran.err
    assert "--debug" in ran.err
    assert "Traceback" in (tmp_path / "run/logs/attempt_1/error.log").read_text()


def test_the_signal_handlers_are_put_back(cft: Cft, training: Callable[..., None]) -> None:
    def train(*rest: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    before = signal.getsignal(signal.SIGTERM)
    training(train)
    assert cft("train", "output_dir=run").code == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_that_holds_a_run_is_refused_unless_clean(
    cft: Cft, training: Callable[..., None]
) -> None:
    training(succeeds)
    assert cft("train", "output_dir=run").code == 0
    ran = cft("train", "output_dir=run")
    assert ran.code == 2
    assert "--clean" in ran.err
    assert cft("train", "output_dir=run", "--clean").code == 0


def test_a_finished_run_has_nothing_to_continue(
    cft: Cft, training: Callable[..., None], tmp_path: Path
) -> None:
    training(succeeds)
    cft("train", "output_dir=run")
    training(fails_with(RuntimeError("must not run")))
    for resume in ("run", "auto"):
        ran = cft("train", *["output_dir=run"] * (resume == "auto"), "--resume", resume)
        assert ran.code == 0
        assert "is finished" in ran.err


def test_resume_by_path_needs_no_overrides_and_refuses_other_ones(
    cft: Cft, training: Callable[..., None], tmp_path: Path
) -> None:
    training(fails_with(Interrupted("stopped")))
    cft("train", "experiment=smoke", "output_dir=run", "seed=3")
    seeds: list[int] = []

    def train(config: object, folder: RunFolder, *rest: object) -> None:
        seeds.append(folder.config().seed)

    training(train)
    ran = cft("train", "experiment=smoke", "seed=4", "--resume", "run")
    assert ran.code == 2
    assert "seed: 3 there, 4 here" in ran.err
    assert cft("train", "--resume", "run").code == 0
    assert seeds == [3]
    assert RunFolder(tmp_path / "run").status()["attempt"] == 2


def test_resume_auto_finds_the_unfinished_run_or_starts_one_and_says_so(
    cft: Cft, training: Callable[..., None], tmp_path: Path
) -> None:
    training(fails_with(Interrupted("stopped")))
    ran = cft("train", "experiment=smoke", "--resume", "auto")
    assert ran.code == 75
    assert "starting a new one" in ran.err
    training(succeeds)
    assert cft("train", "experiment=smoke", "--resume", "auto").code == 0
    (run,) = (tmp_path / "outputs").iterdir()
    assert RunFolder(run).status()["attempt"] == 2


def test_a_resolved_file_runs_again(
    cft: Cft, training: Callable[..., None], tmp_path: Path
) -> None:
    training(succeeds)
    cft("train", "experiment=smoke", "output_dir=first", "seed=3")
    file = str(tmp_path / "first" / "config.yaml")
    assert cft("train", "--config", file).code == 2
    assert cft("train", "--config", file, "output_dir=second", "trainer.kl_weight=2").code == 0
    again = RunFolder(tmp_path / "second").config()
    assert (again.seed, again.trainer.kl_weight) == (3, 2.0)


def test_quiet_leaves_results(cft: Cft, training: Callable[..., None]) -> None:
    training(succeeds)
    ran = cft("-q", "train", "output_dir=run")
    assert "satisfied" in ran.out
    assert "iteration" not in ran.out
    assert ran.err == ""


# --- config -------------------------------------------------------------------------------------


def test_config_show_prints_yaml_that_validates(cft: Cft, tmp_path: Path) -> None:
    ran = cft("config", "show", "experiment=smoke", "output_dir=x")
    assert yaml.safe_load(ran.out)["constraint"]["scorer"]["kind"] == "letters"
    (tmp_path / "mine.yaml").write_text(ran.out)
    assert cft("config", "validate", "mine.yaml").out == "ok: mine.yaml\n"
    assert cft("config", "validate", "mine.yaml", "seed=-1").code == 2
    assert cft("config", "validate", "experiment=smoke").out == "ok: smoke\n"


def test_config_list_names_groups_options_and_keys(cft: Cft) -> None:
    out = cft("config", "list").out
    for part in ("smollm2 · pretrained · tiny", "trainer.kl_weight", "nats per completion token"):
        assert part in out
    only = cft("config", "list", "trainer").out
    assert "trainer.schedule" in only
    assert "auxiliary.rank" not in only


# --- evaluate, generate, selfcheck ----------------------------------------------------------------


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = ModuleType(f"constrained_ft.{name}")
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_generate_gives_rows_to_pipes_and_files(
    cft: Cft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def generate_command(target: str, *, prompts: list[str], n: int, **rest: object) -> object:
        return [
            {"prompt": p, "completion": f" {i}é", "score": 1.0} for p in prompts for i in range(n)
        ]

    fake(monkeypatch, "generate", generate_command=generate_command)
    rows = [json.loads(line) for line in cft("generate", "run", "--prompt", "a").out.splitlines()]
    assert rows == [{"prompt": "a", "completion": " 0é", "score": 1.0}]
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "three"}\n')
    for file, prompts in (("prompts.txt", ["one", "two"]), ("prompts.jsonl", ["three"])):
        assert (
            cft("generate", "run", "--prompts", file, "--n", "2", "--output", "o.jsonl").code == 0
        )
        written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in written] == [p for p in prompts for _ in range(2)]


@pytest.mark.parametrize(
    ("text", "advice"), [("", "holds no prompts"), ("{", "row 1"), ('{"text": "a"}', "`prompt`")]
)
def test_a_bad_prompt_file_is_3(cft: Cft, tmp_path: Path, text: str, advice: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    ran = cft("generate", "run", "--prompts", "prompts.jsonl")
    assert ran.code == 3
    assert advice in ran.err
    assert cft("generate", "run", "--prompts", "nowhere.txt").code == 3


def test_evaluate_hands_its_options_over(cft: Cft, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def evaluate_command(targets: list[str], **options: object) -> None:
        seen.update(options, targets=targets)

    fake(monkeypatch, "compare", evaluate_command=evaluate_command)
    ran = cft("evaluate", "run", "model", "--prompts", "p.txt", "--output", "o.json", "--seed", "3")
    assert ran.code == 0
    assert seen["targets"] == ["run", "model"]
    assert (seen["prompts_file"], seen["output"]) == (Path("p.txt"), Path("o.json"))
    assert (seen["seed"], seen["max_prompts"]) == (3, None)


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_selfcheck_fails_when_a_claim_does(
    cft: Cft, monkeypatch: pytest.MonkeyPatch, *, holds: bool, code: int
) -> None:
    fake(monkeypatch, "selfcheck", selfcheck=lambda display: holds)
    assert cft("selfcheck").code == code


# --- sweeps -------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Jobs of a sweep by their folder; a job whose seed is 13 fails, one with 75 is interrupted."""
    seen: dict[str, list[str]] = {}

    def call(command: Sequence[str]) -> int:
        (folder,) = (word.partition("=")[2] for word in command if word.startswith("output_dir="))
        seen[Path(folder.strip("'")).name] = list(command)
        return {13: 3, 75: 75}.get(snapshot(command).seed, 0)

    monkeypatch.setattr(job_module, "_call", call)
    return seen


def snapshot(command: Sequence[str]) -> Config:
    return load_config(Path(command[command.index("--config") + 1]))


def test_a_sweep_runs_every_job_in_a_folder_of_its_own(
    cft: Cft, calls: dict[str, list[str]], tmp_path: Path
) -> None:
    ran = cft("train", "-m", "trainer.kl_weight=0,1", "experiment=smoke")
    assert ran.code == 0
    assert set(calls) == {"0", "1"}
    assert snapshot(calls["1"]).trainer.kl_weight == 1
    assert snapshot(calls["1"]).name == "smoke"
    assert f"output_dir={tmp_path}/multirun/smoke/1" in calls["1"]
    assert calls["0"][:4] == [sys.executable, "-m", "constrained_ft.cli.main", "train"]


def test_a_failing_job_does_not_stop_the_others_and_is_named(
    cft: Cft, calls: dict[str, list[str]]
) -> None:
    ran = cft("train", "-m", "seed=0,13,1", "experiment=smoke")
    assert set(calls) == {"0", "1", "2"}
    assert ran.code == 3
    assert "1 of 3 jobs are not done: 1" in ran.err
    assert "job 1 (seed=13): failed, exit code 3" in ran.err
    assert "`cft train -m --resume multirun/smoke` repeats them and draws" in ran.err


def test_an_interrupted_job_ends_the_sweep(cft: Cft, calls: dict[str, list[str]]) -> None:
    ran = cft("train", "-m", "seed=75,1", "experiment=smoke")
    assert set(calls) == {"0"}
    assert ran.code == 75


def test_a_sweep_checks_every_job_before_the_first(cft: Cft, calls: dict[str, list[str]]) -> None:
    ran = cft("train", "-m", "constraint.labels=hard,soft", "constraint.threshold=0.9")
    assert ran.code == 2
    assert "job 1 (constraint.labels=soft constraint.threshold=0.9)" in ran.err
    assert not calls


def test_a_sweep_over_used_folders_is_refused(
    cft: Cft, calls: dict[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "1").mkdir(parents=True)
    (tmp_path / "mine" / "1" / "status.json").write_text("{}")
    arguments = ["train", "-m", "seed=0,1", "experiment=smoke", "hydra.sweep.dir=mine"]
    assert cft(*arguments).code == 2
    assert not calls
    assert cft(*arguments, "--resume", "auto").code == 0
    assert f"output_dir={tmp_path}/mine/1" in calls["1"]
    assert calls["1"][-2:] == ["--resume", "auto"]


def test_a_sweep_is_repeated_where_it_is_not_done_with_its_own_configurations(
    cft: Cft, calls: dict[str, list[str]], tmp_path: Path
) -> None:
    own = tmp_path / "my_conf" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /llm: tiny\nname: mine\n"
    own.write_text(f"{text}trainer:\n  kl_weight: 3\n")
    arguments = ["train", "-m", "seed=0,1,2,13,4,5", "experiment=mine", "--config-dir", "my_conf"]
    assert cft(*arguments).code == 3
    own.write_text(f"{text}trainer:\n  kl_weight: 4\n")  # what became of it meanwhile
    sweep = SweepFolder(tmp_path / "multirun" / "mine")
    assert [job.exit_code for job in sweep.jobs()] == [0, 0, 0, 3, 0, 0]
    sweep.run("3").path.mkdir(exist_ok=True)
    sweep.run("3").write_status("failed", reason="a file\nis missing", exit_code=3)
    calls.clear()
    planned = cft("train", "-m", "--resume", "multirun/mine", "--dry-run")
    assert "seed=13" in planned.out
    assert "seed=4" not in planned.out
    assert not calls
    ran = cft("train", "-m", "--resume", "multirun/mine")
    assert ran.code == 3
    assert list(calls) == ["3"]
    assert snapshot(calls["3"]).trainer.kl_weight == 3
    assert "my_conf" not in calls["3"]
    assert calls["3"][-2:] == ["--resume", "auto"]
    assert "1 of 6 jobs are not done: 3\n  job 3 (seed=13): a file is missing\n" in ran.err
    # Done, also where it was continued alone.
    sweep.run("3").write_status("finished", exit_code=0)
    calls.clear()
    again = cft("train", "-m", "--resume", "multirun/mine")
    assert again.code == 0
    assert "every job of multirun/mine is done" in again.out
    assert not calls


def test_the_front_is_drawn_again_when_a_sweep_is_repeated(
    cft: Cft, calls: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = job_module._call

    def evaluated(command: Sequence[str]) -> int:
        code = call(command)
        (folder,) = (word.partition("=")[2] for word in command if word.startswith("output_dir="))
        seed = snapshot(command).seed
        if code == 0 or (seed == 13 and command[-1] == "auto"):
            front_tests.write(Path(folder).parent, Path(folder).name, 0.9 + seed / 1000, 20.0)
            return 0
        return code

    monkeypatch.setattr(job_module, "_call", evaluated)
    assert cft("train", "-m", "seed=0,1,2,13,4,5", "experiment=smoke").code == 3
    summary = tmp_path / "multirun" / "smoke" / "sweep.json"
    first = json.loads(summary.read_text())
    assert [run["job"] for run in first["runs"]] == ["0", "1", "2", "4", "5"]
    assert first["exit_codes"]["3"] == 3
    assert cft("train", "-m", "--resume", "multirun/smoke").code == 0
    second = json.loads(summary.read_text())
    assert [run["job"] for run in second["runs"]] == ["0", "1", "2", "3", "4", "5"]
    assert [run["job"] for run in second["runs"] if run["on_front"]] == ["3"]
    assert set(second["exit_codes"].values()) == {0}


def test_jobs_that_an_interruption_left_are_repeated_too(
    cft: Cft, calls: dict[str, list[str]]
) -> None:
    assert cft("train", "-m", "seed=0,75,1", "experiment=smoke").code == 75
    calls.clear()
    ran = cft("train", "-m", "--resume", "multirun/smoke")
    assert list(calls) == ["1"]  # interrupted again, so job 2 waits
    assert ran.code == 75
    assert "2 of 3 jobs are not done: 1, 2" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--resume", "nowhere"], "holds no sweep"),
        (["--resume", "nowhere", "seed=3"], "takes no KEY=VALUE"),
        (["--resume", "nowhere", "--config-dir", "."], "takes no KEY=VALUE"),
        (
            ["seed=0,1", "hydra.sweep.subdir=x"],
            "hydra.sweep.dir=PATH instead of hydra.sweep.subdir",
        ),
    ],
)
def test_what_a_sweep_does_not_take_is_refused(
    cft: Cft, calls: dict[str, list[str]], arguments: list[str], words: str
) -> None:
    ran = cft("train", "-m", *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert not calls


@pytest.mark.parametrize(
    "launcher",
    [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]],
)
def test_jobs_of_another_launcher_are_counted_too(
    launcher: list[str], cft: Cft, tmp_path: Path
) -> None:
    ran = cft(
        *("train", "-m", "experiment=smoke", "data.path=none.txt,nothing.txt", *launcher),
    )
    assert ran.code == 3
    jobs = SweepFolder(tmp_path / "multirun" / "smoke").jobs()
    assert [job.exit_code for job in jobs] == [3, 3]
    assert "nothing.txt" in jobs[1].reason
    log = tmp_path / "multirun" / "smoke" / "jobs" / "1.log"
    assert "there is no file nothing.txt" in log.read_text()


def test_several_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "usable_cores", lambda: 8)
    shares = {n: job_module._threads(n)["OMP_NUM_THREADS"] for n in (1, 2, 3, -1, -2, 20)}
    assert shares == {1: "8", 2: "4", 3: "2", -1: "1", -2: "1", 20: "1"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system allots no cores")
def test_cores_that_others_were_allotted_do_not_count() -> None:
    code = (
        "import os; from constrained_ft.machine import usable_cores\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(usable_cores())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "1\n"


def test_a_dry_sweep_lists_its_jobs(cft: Cft, calls: dict[str, list[str]], tmp_path: Path) -> None:
    ran = cft("train", "-m", "seed=range(3)", "experiment=smoke", "--dry-run")
    assert ran.code == 0
    assert "seed=2 experiment=smoke" in ran.out
    assert not calls
    assert not [*tmp_path.iterdir()]


def test_a_sweep_finds_the_users_own_groups(
    cft: Cft, calls: dict[str, list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "my_conf" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ndefaults:\n  - override /llm: tiny\nname: mine\n")
    ran = cft("train", "-m", "experiment=smoke,mine", "--config-dir", "my_conf")
    assert ran.code == 0
    assert snapshot(calls["1"]).name == "mine"


def test_hydra_leaves_the_process_as_it_was(cft: Cft, calls: dict[str, list[str]]) -> None:
    from hydra.core.global_hydra import GlobalHydra

    arguments = list(sys.argv)
    cft("train", "-m", "seed=0,1", "experiment=smoke")
    assert sys.argv[1:] == ["train", "-m", "seed=0,1", "experiment=smoke"] != arguments[1:]
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert not GlobalHydra.instance().is_initialized()
    assert cft("train", "--dry-run").code == 0


def test_a_job_is_a_process_whose_exit_code_comes_back() -> None:
    assert job_module._call([sys.executable, "-c", "raise SystemExit(4)"]) == 4
    assert job_module._call(["sh", "-c", "kill -KILL $$"]) == 128 + signal.SIGKILL


def test_a_job_gets_the_signals_of_its_sweep() -> None:
    code = (
        "import signal, os\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while True: signal.pause()\n"
    )
    timer = threading.Timer(30, lambda: None)
    timer.start()
    assert job_module._call([sys.executable, "-c", code]) == 75
    timer.cancel()


# --- what is shown ------------------------------------------------------------------------------


def show(display: PlainDisplay | TerminalDisplay) -> None:
    display.panel("run", {"model": "tiny", "folder": "outputs/run"})
    display.phase("sampling", 100)
    display.advance(50, satisfaction=0.25)
    display.sample("a prompt", "bad \x1b[2J\ntext", "good text", 0.9)
    display.iteration(1, 2, {"rollouts/satisfaction": 0.875, "update/ce": 3.5, "time/update": 9.0})
    display.note("a note")
    display.phase("updating the LLM", 4)
    display.advance(1, ce=3.5, kl=0.01)


def test_plain_lines_have_no_control_characters() -> None:
    stream = StringIO()
    with make_display(Console(file=stream, width=80)) as display:
        show(display)
        display.table("results", ["", "base"], [["satisfied", "0.9"]])
    text = stream.getvalue()
    assert not re.search(r"[^\n -~─-╿]", text)
    for part in ("sampling (100)", "iteration 1 of 2 done: satisfaction 0.875, ce 3.500", "[0.90]"):
        assert part in text


def test_a_long_phase_reports_once_a_minute() -> None:
    now = [0.0]
    stream = StringIO()
    display = PlainDisplay(Console(file=stream, width=80), clock=lambda: now[0])
    display.phase("sampling", 100)
    for _ in range(100):
        now[0] += 1.5
        display.advance(1, satisfaction=0.5)
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "0:00  sampling (100)",
        "1:00  sampling 40/100, satisfaction 0.500",
        "2:00  sampling 80/100, satisfaction 0.500",
    ]


@pytest.mark.parametrize("width", [120, 80, 40])
def test_the_live_picture_fits_and_tells_phase_numbers_and_time(width: int) -> None:
    now = [0.0]
    stream = StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    display = TerminalDisplay(console, clock=lambda: now[0])
    try:
        now[0] = 10.0
        show(display)
        now[0] = 12.0
        drawn = StringIO()
        Console(file=drawn, width=width, force_terminal=True, color_system=None).print(
            display._picture()
        )
    finally:
        display.close()
    lines = drawn.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    picture = "\n".join(lines)
    assert "iteration 2/2 · updating" in picture
    if width >= 80:
        for part in ("1/4 · 0:06 left", "ce 3.500", "kl 0.010", "0:12 so far", "about 0:08 to go"):
            assert part in picture
        assert "good text  0.90" in picture


def test_what_a_model_writes_cannot_move_the_cursor() -> None:
    assert clean("a\x1b[2J\r\nb\u202ec\x00 d") == "a [2J b c d"


# --- the installed package ------------------------------------------------------------------------


@pytest.mark.slow
def test_an_installed_wheel_brings_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    import shutil

    source = tmp_path / "source"
    root = Path(__file__).parent.parent
    unwanted = shutil.ignore_patterns(".git", "build", "*.egg-info", "outputs", "multirun")
    shutil.copytree(root, source, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(wheel, check=True)
    (built,) = tmp_path.glob("*.whl")
    target, empty = tmp_path / "site", tmp_path / "empty"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(built)], check=True)
    assert not (target / "cli").exists()
    assert not (target / "conf").exists()
    empty.mkdir()
    shown = subprocess.run(
        [sys.executable, "-m", "constrained_ft.cli.main", "config", "show", "experiment=smoke"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    corpus = Path(yaml.safe_load(shown.stdout)["data"]["path"])
    assert corpus.is_relative_to(target)
    assert corpus.is_file()
