"""`cft generate` and `cft evaluate` on real, tiny models, and how a run is asked to stop."""

import json
import os
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from constrained_ft import compare, results
from constrained_ft.cli.display import PlainDisplay
from constrained_ft.compare import evaluate_command
from constrained_ft.compose import compose
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ConfigError, DataError, Interrupted, ModelError
from constrained_ft.generate import generate_command
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder
from constrained_ft.tiny import byte_tokenizer, tiny_model
from constrained_ft.train import train

SMALL = (
    *("experiment=smoke", "trainer.iterations=1", "trainer.steps_per_iteration=8"),
    *("prompts.prompts_per_iteration=16", "prompts.max_new_tokens=12"),
    *("evaluation.max_prompts=6", "evaluation.samples_per_prompt=4"),
)
PROMPTS = ["The baker opened", "My brother", "A letter"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "small"
    config = compose([*SMALL, f"output_dir={path}"])
    folder = RunFolder(path).start(config, ["cft", "train"])
    train(config, folder, Silent(), StopRequest())
    folder.write_status("finished", exit_code=0)
    folder.close()
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that cft did not make: one with the run's tokens, one with others."""
    folders = {}
    for shape in ("gpt2", "qwen2"):
        folders[shape] = tmp_path_factory.mktemp("models") / shape
        tiny_model(shape, seed=3).save_pretrained(folders[shape])
        byte_tokenizer().save_pretrained(folders[shape])
    return folders


def generate(
    target: Path, *, guided: bool = False, n: int = 2, **changes: object
) -> list[dict[str, object]]:
    options = {"prompts": PROMPTS, "max_new_tokens": None, "seed": 0, "display": Silent()}
    return generate_command(str(target), n=n, guided=guided, **(options | changes))


def measure(*targets: Path, **changes: object) -> tuple[list[results.Evaluation], str]:
    """The result and what was shown."""
    shown = StringIO()
    options: dict[str, object] = {
        "prompts_file": None,
        "output": None,
        "max_prompts": None,
        "samples_per_prompt": None,
        "seed": 0,
        "display": PlainDisplay(Console(file=shown, width=200)),
    }
    result = evaluate_command([str(target) for target in targets], **(options | changes))
    return result, shown.getvalue()


# cft generate -------------------------------------------------------------------------------------


def test_a_run_completes_prompts_in_order_and_scores_them(run: Path) -> None:
    rows = generate(run)
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    for row in rows:
        assert row["score"] == float("e" not in str(row["completion"]).lower())
    assert generate(run) == rows
    assert generate(run, seed=1) != rows


def test_guidance_makes_violations_rare(run: Path) -> None:
    plain, guided = (generate(run, guided=guided, n=128) for guided in (False, True))
    violations = [sum(row["score"] == 0 for row in rows) for rows in (plain, guided)]
    assert violations[0] > 20
    assert violations[1] < violations[0] / 4


def test_any_model_completes_prompts_without_scores(foreign: dict[str, Path]) -> None:
    rows = generate(foreign["gpt2"], max_new_tokens=5)
    assert {tuple(row) for row in rows} == {("prompt", "completion")}
    assert len(rows) == 6


def test_guidance_without_a_run_says_what_to_give(foreign: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"needs the auxiliary of a run.*config\.yaml"):
        generate(foreign["gpt2"], guided=True)


@pytest.mark.parametrize(
    ("prompt", "advice"), [("a" * 250, "shorten it, or lower max_new_tokens"), (" ", "empty")]
)
def test_a_prompt_that_cannot_be_completed_is_refused(run: Path, prompt: str, advice: str) -> None:
    with pytest.raises(DataError, match=advice):
        generate(run, prompts=["fine", prompt])


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    path = tmp_path / "half"
    config = compose([*SMALL, f"output_dir={path}"])
    folder = RunFolder(path).start(config, ["cft", "train"])
    folder.write_status("interrupted", iteration=3)
    folder.close()
    for command in (generate, measure):
        with pytest.raises(ConfigError, match=r"interrupted after 3 iterations.*--resume"):
            command(path)


def test_a_model_that_is_nowhere_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        generate(tmp_path / "nowhere")


# cft evaluate -------------------------------------------------------------------------------------


def test_evaluating_a_run_gives_what_the_run_measured(run: Path) -> None:
    recorded = results.load(RunFolder(run).evaluation_file)
    measured, _ = measure(run)
    assert [one.model for one in measured] == ["base", "small"]
    for before, now in zip(recorded, measured, strict=True):
        assert now.groups == before.groups
        for group, interval in before.perplexity.items():
            assert now.perplexity[group].mean == pytest.approx(interval.mean, rel=1e-4)
    assert measured[1].kl_to_base == pytest.approx(recorded[1].kl_to_base, rel=1e-3)


def test_runs_and_foreign_models_stand_side_by_side(run: Path, foreign: dict[str, Path]) -> None:
    measured, shown = measure(run, foreign["gpt2"], foreign["qwen2"], samples_per_prompt=2)
    assert [one.model for one in measured] == ["base", "small", "gpt2", "qwen2"]
    assert len({one.groups["corpus"].prompts for one in measured}) == 1
    kls = [one.kl_to_base for one in measured]
    assert kls[0] is None
    assert 0 < kls[1] < kls[2]
    assert kls[3] is None  # another vocabulary
    assert "base small gpt2 qwen2" in " ".join(shown.split())


def test_two_runs_of_one_base_show_it_once(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for part in run.iterdir():
        (other / part.name).symlink_to(part)
    (other / "config.yaml").unlink()
    text = (run / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("opening_words: 5", "opening_words: 4"))
    measured, shown = measure(run, other, samples_per_prompt=2)
    assert [one.model for one in measured] == ["base of small", "small", "other"]
    assert measured[1].groups == measured[2].groups
    assert "other was trained with other prompts" in shown


def test_a_model_alone_is_measured_as_the_default_run_would(
    foreign: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "compose", lambda overrides: compose(SMALL))
    (measured,), _ = measure(foreign["gpt2"], max_prompts=3)
    assert measured.model == "gpt2"
    assert measured.groups["corpus"].prompts == 3
    assert measured.kl_to_base is None


def test_prompts_of_a_file_are_all_used_and_the_result_is_written(
    run: Path, tmp_path: Path
) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "new" / "result.json"
    file.write_text("".join(f"Sentence {i} begins\n" for i in range(9)))
    measured, _ = measure(run, prompts_file=file, output=output, seed=5)
    assert measured[0].groups["file"].prompts == 9
    assert results.load(output) == measured
    settings = json.loads(output.read_text())["settings"]
    assert settings["prompts"] == str(file)
    assert (settings["seed"], settings["samples_per_prompt"]) == (5, 4)
    assert settings["scorer"].startswith("letters")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        measure(tmp_path / "nowhere", output=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        measure(tmp_path / "nowhere", output=tmp_path / "file" / "result.json")


# Stopping -----------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_the_first_signal_is_answered_and_the_second_leaves(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    stop = StopRequest()
    stop.install()
    stop.check()
    signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == "\nstopping at the next safe point; again to leave at once\n"
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.check()
    assert left == []
    signal.raise_signal(signal.SIGINT)
    assert left == [130]
