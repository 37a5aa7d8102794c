"""The baselines that TRL trains: what they reward, what they learn, and what they leave behind."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import go_on, gradients, run, small_config, stopped, tiny_llm
from transformers import AutoModelForCausalLM

from constrained_ft import metrics, train
from constrained_ft.cli.torchrun import Processes
from constrained_ft.compose import compose
from constrained_ft.config import Config
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ConfigError, MissingScoresError, ModelError
from constrained_ft.finetune import backward_of_corpus
from constrained_ft.named_models import final_model
from constrained_ft.parts import build_parts
from constrained_ft.progress import Silent
from constrained_ft.run_folder import RunFolder

pytest.importorskip("trl")

FEW = ("trainer.trl.num_generations=4", "trainer.iterations=2")
SCORER = """
def score(prompts, completions):
    return [None if len(text) % 2 == 1 else sum(map(ord, text)) % 5 / 4 for text in completions]
"""


class Seen:
    """What TRL's trainers handled: a list of calls by name."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        self.rewards: list[tuple[list[list[int]], list[float]]] = []
        self.prompts: list[list[int]] = []
        reward, generate = kind._calculate_rewards, kind._generate_single_turn

        def rewarding(own: Any, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
            found = reward(own, inputs, prompts, completions, ids)
            self.rewards.append((ids, found[:, 0].tolist()))
            return found

        def generating(own: Any, prompt_ids: Any, *rest: Any) -> Any:
            self.prompts += prompt_ids
            return generate(own, prompt_ids, *rest)

        patch.setattr(kind, "_calculate_rewards", rewarding)
        patch.setattr(kind, "_generate_single_turn", generating)


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def grpo(
    tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch
) -> tuple[Config, RunFolder, Seen]:
    """A run of adapters."""
    import trl

    seen = Seen(patch, trl.GRPOTrainer)
    config = small_config("trainer=grpo", "trainer.trl.beta=0.1", *FEW, lora=True)
    return config, run(config, tmp_path_factory.mktemp("grpo") / "run"), seen


@pytest.fixture(scope="module")
def rloo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder]:
    """A run of all weights, held at the base."""
    config = small_config("trainer=rloo", *FEW)
    return config, run(config, tmp_path_factory.mktemp("rloo") / "run")


@pytest.fixture(scope="module")
def kto(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder]:
    """A run of adapters."""
    config = small_config("trainer=kto", *FEW, lora=True)
    return config, run(config, tmp_path_factory.mktemp("kto") / "run")


def _said(folder: RunFolder, iteration: int) -> list[dict[str, Any]]:
    lines = folder.rollouts_file(iteration).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_reward_is_the_score_of_the_same_text(grpo: tuple[Config, RunFolder, Seen]) -> None:
    config, folder, seen = grpo
    tokenizer = tiny_llm().tokenizer
    assert len(seen.rewards) == config.trainer.iterations
    for iteration, (ids, rewards) in enumerate(seen.rewards, start=1):
        ended = [[token for token in one if token != tokenizer.eos_token_id] for one in ids]
        texts = tokenizer.batch_decode(ended)
        assert rewards == [
            float("e" not in text.lower()) for text in texts
        ]  # the letters constraint
        assert 0 < sum(rewards) < len(rewards)
        rows = _said(folder, iteration)
        assert [row["completion"] for row in rows] == texts
        assert [row["score"] for row in rows] == rewards
        row = metrics.read(folder.metrics_file)[iteration - 1]
        assert row["rollouts/satisfaction"] == pytest.approx(sum(rewards) / len(rewards))


def test_trl_samples_training_prompts_in_the_order_of_the_run(
    grpo: tuple[Config, RunFolder, Seen],
) -> None:
    config, _, seen = grpo
    prompts = build_parts(config, Silent(), StopRequest()).prompts
    asked = [
        list(prompt.token_ids)
        for iteration in (1, 2)
        for prompt in prompts.of_iteration(iteration, 10, config.seed)  # 40 completions, 4 of each
        for _ in range(4)
    ]
    assert seen.prompts == asked


@pytest.mark.parametrize("name", ["grpo", "rloo", "kto"])
def test_it_leaves_an_ordinary_run(name: str, request: pytest.FixtureRequest) -> None:
    config, folder = request.getfixturevalue(name)[:2]
    rows = metrics.read(folder.metrics_file)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert rows[-1]["budget/scored_samples"] == 80
    assert rows[-1]["budget/trained_tokens"] == sum(row["update/tokens"] for row in rows)
    assert 0 < rows[0]["budget/seconds"] < rows[1]["budget/seconds"]
    assert rows[0]["update/ce"] > rows[1]["update/ce"] > 0
    said = json.loads(folder.evaluation_file.read_text())
    assert [model["model"] for model in said["models"]] == ["base", "tuned"]
    assert said["budgets"]["tuned"]["budget/scored_samples"] == 80
    written = AutoModelForCausalLM.from_pretrained(folder.final_llm)
    base = tiny_llm().module.state_dict()
    assert written.state_dict().keys() == base.keys()
    assert any(not torch.equal(base[n], tensor) for n, tensor in written.state_dict().items())
    assert final_model(folder).load() is not None
    if config.llm.lora is not None:
        assert not (folder.final_adapter / "ref").exists()
    assert not (folder.path / "reference").exists()


def test_kto_learns_from_completions_of_the_base(kto: tuple[Config, RunFolder]) -> None:
    config, folder = kto
    rows = metrics.read(folder.metrics_file)
    assert rows[0]["rollouts/scored"] == 80
    assert "rollouts/scored" not in rows[1]
    said = [row for iteration in (1, 2) for row in _said(folder, iteration)]
    assert len(said) == 80
    assert all(row["satisfied"] == ("e" not in row["completion"].lower()) for row in said)
    # A byte is a token, and a completion that was cut off at 8 tokens has no end.
    lengths = rows[0]["rollouts/length"]
    assert lengths <= config.prompts.max_new_tokens


def test_a_failed_score_is_missing_to_trl_too(
    tmp_path: Path, grpo: tuple[Config, RunFolder, Seen]
) -> None:
    (tmp_path / "scorer.py").write_text(SCORER)
    seen = grpo[2]
    before = len(seen.rewards)
    asked = (
        "trainer=grpo",
        *FEW,
        "constraint=function",
        f"constraint.scorer.path={tmp_path / 'scorer.py'}:score",
        "auxiliary.vocabulary_prior=false",
    )
    config = small_config(*asked, "constraint.max_missing_rate=0.9", "trainer.iterations=1")
    folder = run(config, tmp_path / "run")
    ((ids, rewards),) = seen.rewards[before:]
    tokenizer = tiny_llm().tokenizer
    ended = [[token for token in one if token != tokenizer.eos_token_id] for one in ids]
    texts = tokenizer.batch_decode(ended)
    absent = [len(text) % 2 == 1 for text in texts]
    assert [reward != reward for reward in rewards] == absent  # NaN is what TRL leaves out
    assert 0 < sum(absent) < len(absent)
    kept = [text for text, gone in zip(texts, absent, strict=True) if not gone]
    assert [row["completion"] for row in _said(folder, 1)] == kept
    (row,) = metrics.read(folder.metrics_file)
    assert row["rollouts/missing"] == pytest.approx(sum(absent) / len(absent))
    with pytest.raises(MissingScoresError, match=r"max_missing_rate=0\.1"):
        train_only(small_config(*asked, "constraint.max_missing_rate=0.1"), tmp_path / "few")


def train_only(config: Config, path: Path) -> None:
    """TRL's part of a run."""
    from constrained_ft.trl_baselines import train_by_trl

    folder = RunFolder(path).start(config, ["cft", "train"])
    train_by_trl(build_parts(config, Silent(), StopRequest()), config, folder, 0)


def test_the_corpus_part_is_the_mean_cross_entropy() -> None:
    config = small_config(lora=False)
    parts = build_parts(config, Silent(), StopRequest())
    rows = parts.corpus.training[:5]
    ce, tokens = backward_of_corpus(parts.llm, [rows[:3], rows[3:]])
    found = gradients(parts.llm)
    total = torch.zeros(())
    for row in rows:
        logits = parts.llm.module(input_ids=torch.tensor([row.token_ids])).logits[0, :-1]
        trained = torch.tensor(row.trained[1:])
        following = torch.tensor(row.token_ids[1:])
        total = total + torch.nn.functional.cross_entropy(
            logits[trained], following[trained], reduction="sum"
        )
    assert tokens == sum(sum(row.trained) for row in rows)
    (total / tokens).backward()
    assert ce == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    for name, gradient in gradients(parts.llm).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_run_that_was_stopped_continues(tmp_path: Path) -> None:
    config = small_config("trainer=grpo", *FEW, lora=True)
    stopped(config, tmp_path / "run", after=1)
    folder = go_on(config, tmp_path / "run")
    rows = metrics.read(folder.metrics_file)
    assert [row["iteration"] for row in rows] == [1, 2]
    assert rows[-1]["budget/scored_samples"] == 80
    assert rows[-1]["update/learning_rate"] == 0  # the schedule went on


def test_without_the_extra_nothing_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(train, "build_parts", lambda *_, **__: pytest.fail("it was loaded"))
    config = small_config("trainer=grpo", *FEW)
    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with pytest.raises(ModelError, match=r"pip install 'constrained-ft\[trl\]'") as caught:
        train.train(config, folder, Silent(), StopRequest())
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.trl.num_generations=3",), "must divide an iteration's 64 completions"),
        (("trainer.steps_per_iteration=5",), "to divide by its 5 steps"),
        (("placement=peers",), "use placement=inline"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["trainer=grpo", *overrides])


def test_several_processes_are_refused() -> None:
    with pytest.raises(ConfigError, match="in one process"):
        Processes(per_node=2).check(compose(["trainer=rloo"]))
