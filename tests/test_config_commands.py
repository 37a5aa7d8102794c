"""`cft config copy|diff|schema`, one file with --config, tab completion, and the reference page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from shell import Cft

from constrained_ft.compose import compose, config_to_yaml
from constrained_ft.config import Config
from constrained_ft.config_file import is_complete
from constrained_ft.errors import ConfigError
from constrained_ft.groups import groups, package_file
from constrained_ft.json_schema import json_schema
from constrained_ft.run_folder import RunFolder

ROOT = Path(__file__).parent.parent


def composed(file: Path, *overrides: str) -> Config:
    return compose(overrides, (), file)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    return file


# --- one file -----------------------------------------------------------------------------------

FLAT = """
experiment: smoke
trainer.kl_weight: 20
trainer.learning_rate: 1e-4
llm.lora: {r: 4, alpha: 8, dropout: 0, target_modules: [q_proj], first_layer: 0}
constraint.scorer.letter: "a"
"""
NESTED = """
defaults:
  - experiment: smoke
trainer:
  kl_weight: 20
  learning_rate: 1e-4
llm:
  lora: {r: 4, alpha: 8, dropout: 0, target_modules: [q_proj], first_layer: 0}
constraint:
  scorer: {letter: "a"}
"""
WORDS = (
    *("experiment=smoke", "trainer.kl_weight=20", "trainer.learning_rate=1e-4", "output_dir=x"),
    *("llm.lora={r:4,alpha:8,dropout:0,target_modules:[q_proj],first_layer:0}",),
    *("constraint.scorer.letter=a",),
)


@pytest.mark.parametrize("text", [FLAT, NESTED], ids=["flat", "nested"])
def test_a_file_is_what_the_same_words_on_the_command_line_are(tmp_path: Path, text: str) -> None:
    assert composed(written(tmp_path, text), "output_dir=x") == compose(WORDS)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, FLAT)
    assert composed(file, "trainer.kl_weight=3").trainer.kl_weight == 3.0
    assert composed(file, "llm.lora=null").llm.lora is None
    lora = composed(file, "llm.lora.r=9").llm.lora
    assert lora is not None
    assert (lora.r, lora.alpha) == (9, 8.0)
    # As an experiment does, it keeps its keys where another option is chosen.
    other = written(tmp_path, "trainer: sft\ntrainer.iterations: 7\n")
    assert composed(other, "trainer=overlapped").trainer.schedule == "overlapped"
    assert composed(other, "trainer=overlapped").trainer.iterations == 7


def test_a_complete_file_is_taken_as_it_stands(tmp_path: Path) -> None:
    whole = compose(["experiment=smoke", "output_dir=x"])
    file = written(tmp_path, config_to_yaml(whole))
    assert is_complete(file)
    assert not is_complete(written(tmp_path, FLAT))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  kl_wieght: 3\n", "line 2: unknown key trainer.kl_wieght; did you mean"),
        ("seed: 1\nmicro_batch_size: 3\n", "line 2: unknown key micro_batch_size; here it is"),
        ("seed: 1\ntrainer:\n  iterations: 0\n", "line 3: trainer.iterations: got 0, must be"),
        ("llm: tinny\n", "line 1: llm=tinny: there is no such option; did you mean tiny?"),
        ("defaults:\n  - llm: tinny\n", "line 2: llm=tinny: there is no such option"),
        ("experiment: 3\n", "line 1: experiment: got 3, must be one of"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("trainer.iterations: 1\ntrainer:\n  iterations: 2\n", "trainer.iterations is set twice"),
        ("defaults: smoke\n", "defaults must be a list"),
        ("- 1\n", "holds no keys"),
        ("a: [1\n", "cannot read the YAML"),
        ("llm: pretrained\n", "llm.model_name_or_path is not set"),
        ("data:\n  path: corpus.txt\n", "line 2: data: give exactly one of"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(
    cft: Cft, tmp_path: Path, text: str, message: str
) -> None:
    written(tmp_path, text)
    ran = cft("train", "--config", "my.yaml", "--dry-run")
    assert ran.code == 2
    assert message in " ".join(ran.err.split())
    if "line" in message:
        assert ran.err.startswith("error: my.yaml, line ")


def test_what_the_command_line_sets_wrong_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.kl_weight: got -1"):
        composed(written(tmp_path, FLAT), "trainer.kl_weight=-1")


def test_a_file_goes_with_folders_and_sweeps(cft: Cft, tmp_path: Path) -> None:
    assert cft("config", "copy", "trainer/alternating", "mine", "--as", "quick").code == 0
    written(tmp_path, "trainer: quick\nexperiment: smoke\n")
    ran = cft("train", "--config", "my.yaml", "--config-dir", "mine", "--dry-run")
    assert ran.code == 0
    assert cft("train", "--config", "my.yaml", "--dry-run").code == 2
    sweep = cft(
        "train", "-m", "--config", "my.yaml", "--config-dir", "mine", "seed=0,1", "--dry-run"
    )
    assert sweep.code == 0
    assert "seed=1" in sweep.out


# --- copy, diff, schema -------------------------------------------------------------------------


def test_copy_gives_a_file_to_change_and_the_command_that_uses_it(cft: Cft, tmp_path: Path) -> None:
    ran = cft("config", "copy", "trainer/alternating")
    file = tmp_path / "conf/trainer/my_alternating.yaml"
    assert file.read_text() == Path(package_file("trainer/alternating.yaml")).read_text()
    command = ran.out.splitlines()[-1]
    assert command == "cft train --config-dir conf trainer=my_alternating"
    file.write_text(file.read_text().replace("iterations: 96", "iterations: 5"))
    shown = cft(*command.split()[1:], "--dry-run").out
    assert "5 iterations x 2" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer/alternatin"], "did you mean trainer/alternating?"),
        (["trainer"], "no such file"),
        (["trainer/sft", "--as", "overlapped"], "--as overlapped"),
        (["trainer/sft", "--as", "../sft"], "--as ../sft"),
    ],
)
def test_copy_refuses_what_would_not_work(cft: Cft, arguments: list[str], message: str) -> None:
    ran = cft("config", "copy", *arguments)
    assert ran.code == 2
    assert message in ran.err


def test_copy_never_overwrites(cft: Cft, tmp_path: Path) -> None:
    cft("config", "copy", "trainer/sft")
    file = tmp_path / "conf/trainer/my_sft.yaml"
    file.write_text("mine")
    assert cft("config", "copy", "trainer/sft").code == 2
    assert file.read_text() == "mine"


@pytest.mark.parametrize("option", [f"{g}/{o}" for g, names in groups().items() for o in names])
def test_every_file_can_be_copied(cft: Cft, option: str) -> None:
    assert cft("-q", "config", "copy", option).code == 0


def test_diff_compares_runs_and_files_key_by_key(cft: Cft, tmp_path: Path) -> None:
    one = compose(["experiment=smoke", "output_dir=one"])
    RunFolder(tmp_path / "one").start(one, ["cft"]).close()
    written(tmp_path, "experiment: smoke\ntrainer.kl_weight: 7\noutput_dir: one\n")
    ran = cft("config", "diff", "one", "my.yaml")
    assert ran.code == 0
    assert "trainer.kl_weight 100.0 7.0" in " ".join(ran.out.split())
    assert "seed" not in ran.out
    assert "the same configuration" in cft("config", "diff", "one", "one/config.yaml").out
    assert cft("config", "diff", "one", "nowhere").code == 2


def test_the_schema_takes_what_cft_takes(cft: Cft) -> None:
    schema = json.loads(cft("config", "schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    for option in groups()["constraint"]:
        file = yaml.safe_load(Path(package_file(f"constraint/{option}.yaml")).read_text())
        file.pop("defaults", None)
        problems = [p for p in judge.iter_errors({"constraint": file}) if "???" not in p.message]
        assert not problems or "???" in str(file), (option, problems)
    for text in (FLAT, NESTED, config_to_yaml(compose(["experiment=smoke"]))):
        judge.validate(yaml.safe_load(text.replace("1e-4", "0.0001")))


@pytest.mark.parametrize(
    "tree",
    [
        {"trainer": {"kl_wieght": 1}},
        {"trainer.kl_wieght": 1},
        {"trainer": {"iterations": 0}},
        {"llm": "tinny"},
        {"defaults": [{"llm": "tinny"}]},
        {"constraint": {"scorer": {"kind": "letters", "leter": "a"}}},
    ],
    ids=str,
)
def test_the_schema_refuses_mistakes(tree: object) -> None:
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(tree)


def test_the_schema_says_what_keys_mean() -> None:
    described = json_schema()["$defs"]["TrainerConfig"]["properties"]["kl_weight"]
    assert described["description"].startswith("lambda. The loss is the corpus cross-entropy")
    assert described["minimum"] == 0


# --- completion ---------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What bash is offered for the last word; it splits words at `=` itself."""
    environment = os.environ | {
        "_CFT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["cft", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "from constrained_ft.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['cft']; {code}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_groups_options_keys_and_values() -> None:
    assert completed("train", "traine") == ["trainer=", "trainer."]
    assert completed("train", "trainer", "=", "ov") == ["overlapped"]
    assert completed("train", "seed", "=", "1", "trainer.sch") == [
        "trainer.schedule=",
        "trainer.schedule=alternating",
        "trainer.schedule=overlapped",
    ]
    assert completed("train", "trainer.schedule", "=") == ["alternating", "overlapped"]
    assert "llm.lora.r=" in completed("train", "llm.lora.")
    assert completed("config", "copy", "llm/sm") == ["llm/smollm2"]
    assert completed("config", "list", "guard.k") == ["guard.kl_limit"]


def test_completion_loads_neither_torch_nor_hydra() -> None:
    code = (
        "import sys\n"
        "from constrained_ft.cli.main import app\n"
        "from constrained_ft.cli.completion import _names, _values\n"
        "assert [*_names('trainer.', [])] and [*_values('trainer.schedule', 'a', [])]\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the reference ------------------------------------------------------------------------------


def test_the_reference_page_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "write_reference.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
