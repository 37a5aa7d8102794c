"""Composition and validation: what is shipped is right, and what is wrong is named."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from constrained_ft.compose import compose, config_to_yaml, differences, load_config
from constrained_ft.config import Config
from constrained_ft.errors import ConfigError
from constrained_ft.foreign_names import FOREIGN_NAMES
from constrained_ft.groups import default_options, groups
from constrained_ft.keys import keys_of_schema
from constrained_ft.overrides import assignment, expand_sweep, normalise

# Keys that only the user can give, by option.
OPEN = {
    ("llm", "pretrained"): ["llm.model_name_or_path=some/model"],
    ("data", "file"): ["data.path=corpus.jsonl"],
    ("data", "hub"): ["data.name=some/data"],
    ("prompts", "file"): ["prompts.path=prompts.txt"],
    ("constraint", "function"): ["constraint.scorer.path=my_scorer.py:score"],
    ("constraint", "words"): ["constraint.scorer.path=words.txt"],
    ("constraint", "regex"): ["constraint.scorer.pattern=abc"],
    ("constraint", "hf"): [
        "constraint.scorer.model_name_or_path=some/model",
        "constraint.scorer.labels=[toxic]",
    ],
    ("sampler", "vllm_server"): ["sampler.url=http://127.0.0.1:8000"],
    ("experiment", "seven_billion"): ["data.name=OWNER/NAME"],
    ("constraint", "embedding"): ["constraint.scorer.references=[yes]"],
    ("constraint", "http"): [
        "constraint.scorer.url=http://localhost:1/",
        "constraint.scorer.request={texts: '{completions}'}",
    ],
}
OPTIONS = [(group, option) for group, options in groups().items() for option in options]


def refusal(*overrides: str, config_dirs: tuple[Path, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, config_dirs)
    assert caught.value.exit_code == 2
    return str(caught.value)


def user_dir(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / "my_conf" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return tmp_path / "my_conf"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_shipped_option_composes_and_validates(group: str, option: str) -> None:
    config = compose([f"{group}={option}", *OPEN.get((group, option), [])])
    assert load_text(config_to_yaml(config)) == config


def load_text(text: str) -> Config:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(text)
        return load_config(file)


@pytest.mark.parametrize("file", sorted(Path("conf").rglob("*.yaml")), ids=str)
def test_every_shipped_yaml_explains_itself(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("#")


def test_the_groups_are_those_of_the_schema_and_the_defaults_name_all_of_them() -> None:
    assert set(default_options()) == set(groups())
    assert set(groups()) - {"experiment"} <= set(Config.model_fields)


def test_every_key_has_a_meaning() -> None:
    undocumented = [key.path for key in keys_of_schema().values() if not key.doc]
    assert not [path for path in undocumented if not path.endswith(".kind")]


def test_the_run_folder_is_named_after_run_and_time() -> None:
    assert re.fullmatch(r"outputs/smoke-\d{8}-\d{6}", compose(["experiment=smoke"]).output_dir)
    assert compose(["name=mine", "output_dir=a/${name}"]).output_dir == "a/mine"


def test_the_shipped_experiments_compose() -> None:
    clean = compose(["experiment=clean_domain"])
    assert list(clean.data.sources) == ["news"]
    assert clean.trainer == compose([]).trainer
    large = compose(["experiment=seven_billion", "data.name=OWNER/NAME"])
    assert (large.placement.kind, large.trainer.schedule) == ("peers", "overlapped")
    assert large.prompts.name == "allenai/real-toxicity-prompts"
    assert large.evaluation.samples_per_prompt == 25


def test_smoke_brings_its_corpus_and_takes_either_schedule() -> None:
    config = compose(["experiment=smoke", "trainer=overlapped"])
    assert config.trainer.schedule == "overlapped"
    assert config.data.path is not None
    assert len(Path(config.data.path).read_text().splitlines()) == 200
    assert config.evaluation.judge is None


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose(["experiment=smoke", "llm=smollm2", "trainer.kl_weight=3"])
    assert config.llm.lora is not None
    assert config.trainer.kl_weight == 3.0


def test_a_known_key_needs_no_plus_and_may_have_one() -> None:
    assert compose(["data=file", "data.path=a.txt", "data.split=test"]).data.split == "test"
    assert compose(["+trainer.kl_weight=2"]).trainer.kl_weight == 2.0
    assert compose(["++trainer.kl_weight=2"]).trainer.kl_weight == 2.0
    assert compose(["+experiment=smoke"]).name == "smoke"
    assert compose(["experiment=null"]).name == "run"


@pytest.mark.parametrize("value", ["my file (1).txt", "a:b#c=d", "wheel://x==1/y.txt#sha256=ab"])
def test_a_path_needs_no_quotes_of_its_own(value: str) -> None:
    assert compose(["data=file", f"data.path={value}"]).data.path == value
    assert compose(["data=file", assignment("data.path", value)]).data.path == value


INVALID = [
    # A key that nobody knows, with what was meant.
    ("trainer.kl_wieght=1", "trainer.kl_wieght", "trainer.kl_weight"),
    ("+trainer.kl_wieght=1", "trainer.kl_wieght", "trainer.kl_weight"),
    ("++trainer.kl_wieght=1", "trainer.kl_wieght", "trainer.kl_weight"),
    ("~trainer.kl_wieght", "trainer.kl_wieght", "trainer.kl_weight"),
    ("trainr.iterations=3", "trainr.iterations", "trainer.iterations"),
    ("+trainr.lr=3", "trainr.lr", "trainer.learning_rate"),
    ("learning_rate=1e-4", "learning_rate", "trainer.learning_rate"),
    ("llm.learning_rate=1e-4", "llm.learning_rate", "trainer.learning_rate"),
    ("sead=1", "sead", "seed"),
    ("llm.lora.rr=1", "llm.lora.rr", "llm.lora.r"),
    ("data.sources.mine.pth=a", "data.sources.mine.pth", "data.sources.<name>.path"),
    ("zzz=1", "zzz", "cft config list"),
    # Other tools' names.
    ("micro_batch_size=4", "micro_batch_size", "trainer.per_device_train_batch_size"),
    ("trainer.lr=1e-4", "trainer.lr", "trainer.learning_rate"),
    ("trainer.lrr=1e-4", "trainer.lrr", "trainer.learning_rate"),
    ("base_model=gpt2", "base_model", "llm.model_name_or_path"),
    ("lora_r=8", "lora_r", "llm.lora.r"),
    ("trainer.beta=0.1", "trainer.beta", "trainer.kl_weight"),
    ("num_train_epochs=3", "num_train_epochs", "trainer.iterations"),
    ("data.max_seq_length=9", "data.max_seq_length", "data.max_length"),
    # Options.
    ("llm=smolm2", "llm=smolm2", "did you mean smollm2?"),
    ("llm=org/model", "llm=org/model", "llm=pretrained llm.model_name_or_path=org/model"),
    ("data=my.jsonl", "data=my.jsonl", "data=file data.path=my.jsonl"),
    ("experiment=smok", "experiment=smok", "did you mean smoke?"),
    ("trainer=3", "trainer=3", "alternating, filtered, grpo, kto, overlapped"),
    ("llm=null", "llm=null", "tiny"),
    ("~llm", "~llm", "tiny"),
    # Types and bounds.
    ("trainer.iterations=0", "trainer.iterations", "a whole number > 0"),
    ("trainer.iterations=2.5", "trainer.iterations", "a whole number > 0"),
    ("trainer.iterations='5'", "trainer.iterations", "got '5'"),
    ("trainer.iterations=true", "trainer.iterations", "got true"),
    ("trainer.iterations=[1]", "trainer.iterations", "got [1]"),
    ("trainer.iterations=null", "trainer.iterations", "got null"),
    ("seed=-1", "seed", "a whole number ≥ 0"),
    ("constraint.threshold=1.5", "constraint.threshold", "a number > 0 and ≤ 1"),
    ("guard.kl_limit=nan", "guard.kl_limit", "a number > 0"),
    ("trainer.schedule=overlaped", "trainer.schedule", "one of alternating, overlapped"),
    ("llm.gradient_checkpointing=1", "llm.gradient_checkpointing", "true or false"),
    ("llm.lora.target_modules=3", "llm.lora.target_modules", "all-linear or a list"),
    ("llm.lora=3", "llm.lora", "a section or null"),
    ("name=2024", "name", "to give it as text"),
    ("constraint.scorer.kind=regexp", "constraint.scorer.kind", "linear, words"),
    ("constraint.scorer.words=[a]", "constraint.scorer.words", "linear has no such key"),
    ("constraint.scorer.kind=words", "constraint.scorer", "give `path`"),
    # What is left open.
    ("llm=pretrained", "llm.model_name_or_path", "is not set"),
    ("~trainer.learning_rate", "trainer.learning_rate", "is missing"),
    # Pairs.
    ("constraint.labels=tilt constraint.beta=0", "constraint", "beta > 0"),
    ("constraint.threshold=0.9 constraint.labels=soft", "constraint", "labels=hard"),
    ("experiment=smoke evaluation.judge={kind:letters,letter:e,at_most:0}", "", "judge itself"),
    ("trainer.warmup_steps=9999", "trainer", "warmup_steps=9999"),
    ("data.name=some/data", "data", "data=hub data.name=NAME"),
    # Syntax.
    ("trainer.kl_weight", "trainer.kl_weight", "KEY=VALUE"),
    ("trainer.kl_weight=0,1", "trainer.kl_weight=0,1", "add -m"),
    ("hydra.sweep.dir=x", "hydra.sweep.dir", "add -m"),
    ("trainer@x=overlapped", "trainer@x", "without @x"),
    ("output_dir=${nam}", "output_dir", "refers to no key"),
]


@pytest.mark.parametrize(("overrides", "key", "advice"), INVALID)
def test_a_wrong_configuration_is_refused_with_its_key_and_what_to_do(
    overrides: str, key: str, advice: str
) -> None:
    started = time.thread_time()
    message = refusal(*overrides.split())
    assert time.thread_time() - started < 1.0
    assert key in message
    assert advice in message
    for jargon in ("hydra.errors", "pydantic", "https:", "Extra inputs", "validation error"):
        assert jargon not in message


def test_all_mistakes_are_named_at_once() -> None:
    message = refusal("trainer.iterations=0", "seed=-1")
    assert message.startswith("2 problems:")
    message = refusal("trainer.lrr=0", "seeed=-1")
    assert "learning_rate" in message
    assert "did you mean seed?" in message


def test_nothing_imports_torch_before_the_configuration_is_right() -> None:
    code = (
        "import sys\n"
        "from constrained_ft.compose import compose\n"
        "from constrained_ft.errors import ConfigError\n"
        "compose([])\n"
        "try: compose(['trainer.lrr=1'])\n"
        "except ConfigError: pass\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_typo_in_an_experiment_of_the_users_is_named_with_its_file(tmp_path: Path) -> None:
    text = "# @package _global_\ntrainer:\n  kl_wieght: 3\n"
    folder = user_dir(tmp_path, "experiment/mine.yaml", text)
    message = refusal("experiment=mine", config_dirs=(folder,))
    assert "experiment/mine.yaml" in message
    assert "did you mean trainer.kl_weight?" in message


def test_a_typo_in_a_group_of_the_users_is_named_with_its_file(tmp_path: Path) -> None:
    text = "defaults: [alternating, _self_]\nstepz: 3\n"
    folder = user_dir(tmp_path, "trainer/mine.yaml", text)
    message = refusal("trainer=mine", config_dirs=(folder,))
    assert "unknown key trainer.stepz" in message
    assert "trainer/mine.yaml" in message


def test_an_experiment_that_names_an_unknown_option_is_refused(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /llm: tinny\n"
    folder = user_dir(tmp_path, "experiment/mine.yaml", text)
    message = refusal("experiment=mine", config_dirs=(folder,))
    assert "llm/tinny" in message
    assert "provider=" not in message


def test_a_user_s_groups_and_experiments_are_found(tmp_path: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /llm: tiny\nname: mine\nseed: 7\n"
    folder = user_dir(tmp_path, "experiment/mine.yaml", text)
    config = compose(["experiment=mine"], [folder])
    assert (config.name, config.seed, config.llm.lora) == ("mine", 7, None)
    shipped = groups()["experiment"]
    assert "smoke" in shipped
    assert groups([folder])["experiment"] == sorted([*shipped, "mine"])


def test_a_user_s_file_that_would_be_hidden_by_ours_is_refused(tmp_path: Path) -> None:
    folder = user_dir(tmp_path, "llm/tiny.yaml", "model_name_or_path: mine\n")
    assert "my_tiny.yaml" in refusal(config_dirs=(folder,))


def test_broken_yaml_and_missing_folders_are_named(tmp_path: Path) -> None:
    folder = user_dir(tmp_path, "experiment/mine.yaml", "# @package _global_\na: [1\nb: 2\n")
    assert "mine.yaml" in refusal("experiment=mine", config_dirs=(folder,))
    assert "there is no such folder" in refusal(config_dirs=(tmp_path / "nowhere",))


def test_a_resolved_file_is_read_back_and_takes_overrides(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    config = compose(["experiment=smoke"])
    file.write_text(config_to_yaml(config).replace("learning_rate: 0.003", "learning_rate: 3e-3"))
    assert load_config(file) == config
    changed = load_config(file, ["trainer.kl_weight=5"])
    assert differences(config, changed) == {"trainer.kl_weight": (100.0, 5.0)}


@pytest.mark.parametrize(
    ("text", "override", "advice"),
    [
        ("a: 1\n", "", "not a complete configuration"),
        ("[1, 2]\n", "", "holds no keys"),
        ("a: [1\n", "", "cannot read the YAML"),
        ("", "trainer=overlapped", "already composed"),
        ("", "trainer.lrr=3", "trainer.learning_rate"),
        ("", "trainer.iterations=0", "a whole number > 0"),
        ("", "~trainer.iterations", "write trainer.iterations=VALUE"),
        ("extra: 1\n", "", "unknown key extra"),
        ("seed: -1\n", "", "config.yaml: seed"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, override: str, advice: str) -> None:
    file = tmp_path / "config.yaml"
    whole = config_to_yaml(compose([]))
    complete = not text or text in ("extra: 1\n", "seed: -1\n")
    file.write_text((whole.replace("seed: 0\n", "") + "seed: 0\n") if complete else "")
    if text == "seed: -1\n":
        file.write_text(file.read_text().replace("seed: 0\n", text))
    elif text:
        file.write_text(file.read_text() + text)
    with pytest.raises(ConfigError, match=re.escape(advice)):
        load_config(file, [override] if override else [])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("tool", FOREIGN_NAMES)
def test_foreign_names_lead_to_keys_that_exist_or_say_what_to_do(tool: str) -> None:
    for foreign, ours in FOREIGN_NAMES[tool].items():
        keys = re.findall(r"[a-z_]+(?:\.[a-z_]+)+|^output_dir$|^name$|^seed$", ours)
        keys = [key for key in keys if key != "metrics.jsonl"]
        assert set(keys) <= set(keys_of_schema()), foreign
        assert keys or re.match("no key.*(leave it out|use the|upload|`cft|measured)", ours), (
            foreign
        )
        assert foreign not in keys_of_schema()


@pytest.mark.parametrize(
    ("foreign", "key", "tool"),
    [
        ("base_model", "llm.model_name_or_path", "axolotl"),
        ("micro_batch_size", "trainer.per_device_train_batch_size", "axolotl"),
        ("sequence_len", "data.max_length", "axolotl"),
        ("val_set_size", "data.validation_share", "axolotl"),
        ("num_generations", "prompts.samples_per_prompt", "TRL"),
        ("max_completion_length", "prompts.max_new_tokens", "TRL"),
        ("beta", "trainer.kl_weight", "TRL"),
        ("reward_funcs", "constraint.scorer", "TRL"),
        ("lora_r", "llm.lora.r", "TRL"),
        ("lora_rank", "llm.lora.r", "LLaMA-Factory"),
        ("cutoff_len", "data.max_length", "LLaMA-Factory"),
        ("num_train_epochs", "trainer.iterations", "transformers"),
        ("lr_scheduler_type", "trainer.lr_scheduler", "transformers"),
        ("deepspeed", "--nproc-per-node", "transformers"),
        ("save_steps", "checkpoint", "transformers"),
    ],
)
def test_the_names_of_other_tools_are_answered_with_ours(foreign: str, key: str, tool: str) -> None:
    for section in ("", "trainer."):
        message = refusal(f"{section}{foreign}=1")
        assert f"unknown key {section}{foreign}; here" in message
        assert key in message
        assert f"({foreign} is the name in {tool})" in message


def test_a_sweep_is_every_combination() -> None:
    jobs = expand_sweep(["seed=range(2)", "trainer=alternating,overlapped", "name=a"])
    assert len(jobs) == 4
    assert jobs[0] == ["seed=0", "trainer=alternating", "name=a"]
    assert len({tuple(job) for job in jobs}) == 4


def test_a_sweep_over_something_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean overlapped"):
        normalise(["trainer=alternating,overlaped"], sweep=True)
    with pytest.raises(ConfigError, match="learning_rate"):
        normalise(["trainer.lr=1,2"], sweep=True)
    assert normalise(["hydra.sweep.dir=x", "seed=1,2"], sweep=True) == [
        "hydra.sweep.dir=x",
        "++seed=1,2",
    ]
