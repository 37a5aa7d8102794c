"""A head that tells labels, trained beside the model's own: as transformers would, and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from several import together
from small import LORA, go_on, gradients, run, small_config, small_parts, stopped
from test_detection import ASK, detection_of, labelled, write_jsonl
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from constrained_ft import results
from constrained_ft.config import Config, DataConfig, SourceConfig
from constrained_ft.corpus import load_corpus, prompt_and_text
from constrained_ft.data_check import check_command
from constrained_ft.detection import load_questions
from constrained_ft.distributed import StopRequest, World
from constrained_ft.encoding import Row
from constrained_ft.errors import ConfigError, DataError
from constrained_ft.finetune import backward_of_corpus, update_llm
from constrained_ft.llm import LLM
from constrained_ft.loading import load_frozen, load_llm, plain_config
from constrained_ft.parts import shard_llm
from constrained_ft.perplexity import perplexity
from constrained_ft.progress import Silent
from constrained_ft.prompts import load_prompts
from constrained_ft.target import learn_target
from constrained_ft.tiny import byte_tokenizer

HEAD = ASK | {"by": "head"}


def config_of(folder: Path, *overrides: str, lora: bool = False) -> Config:
    """Labelled texts for the head, and the same texts as text."""
    path = write_jsonl(folder / "rows.jsonl", labelled(240, 0))
    config = small_config("guard.min_entropy=0", *overrides, lora=lora)
    sources = {"questions": {"path": path, "question": HEAD}, "texts": {"path": path}}
    tree = config.model_dump()
    tree["data"] |= {"path": None, "format": "auto", "sources": sources}
    tree["auxiliary"] |= {"vocabulary_prior": False}
    return Config.model_validate(tree)


def headed(config: Config) -> LLM:
    tokenizer = byte_tokenizer()
    return load_llm(config.llm, tokenizer, precision="fp32", seed=0, class_head=True)


# Rows ---------------------------------------------------------------------------------------------


def test_a_labelled_text_becomes_a_question_with_a_label(tmp_path: Path) -> None:
    config = config_of(tmp_path).data
    assert config.has_class_head
    tokenizer = byte_tokenizer()
    corpus = load_corpus(config, tokenizer)
    asked = [row for row in corpus.training if row.group == "questions"]
    others = [row for row in corpus.training if row.group == "texts"]
    assert asked
    assert others
    for row in asked:
        text = str(tokenizer.decode(list(row.token_ids)))
        assert text.endswith("?")  # no end of text: nothing follows the question
        assert row.label is ("river" in text or "grass" in text)
        assert not any(row.trained)
        assert row.num_targets == 1
        # A filter of the corpus judges what is learned to be said: here nothing.
        assert prompt_and_text(row, tokenizer) == (text, "")
    assert all(row.label is None and row.num_targets == sum(row.trained) for row in others)


def test_a_question_is_not_cut(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a" * 40, "bad": 1}])
    source = {"path": path, "question": HEAD}
    tree = {"sources": {"a": source}, "max_length": 40, "validation_share": 0}
    with pytest.raises(DataError, match=r"has 41 tokens as a question, above data\.max_length=40"):
        load_corpus(DataConfig.model_validate(tree), byte_tokenizer())


def test_data_check_shows_the_label(tmp_path: Path) -> None:
    report = check_command(config_of(tmp_path), Silent(), row=1, scored=0)
    last = report.tokens[1][-1]
    assert last[2:] == ["'?'", last[3]]
    assert last[3] in ("label: positive", "label: negative")
    cells = [cell for row in report.groups[1] for cell in row]
    assert any("240 labelled" in cell for cell in cells)
    assert any(cell.endswith("0 of them trained; 240 labels") for cell in cells)


def test_held_out_labels_have_no_perplexity(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    rows = load_corpus(config.data, byte_tokenizer()).validation
    assert {row.group for row in rows} == {"questions", "texts"}
    assert set(perplexity(headed(config).frozen(), rows, 9, StopRequest())) == {"texts"}


# Loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["llama", "gpt2", "qwen2", "gemma"])
def test_the_gradient_is_that_of_sequence_classification(tmp_path: Path, shape: str) -> None:
    config = small_config(f"llm.model_name_or_path=tiny:{shape}")
    llm = headed(config)
    assert llm.class_head is not None
    with torch.no_grad():
        llm.class_head.normal_(generator=torch.Generator().manual_seed(0))
    rows = [
        Row(
            token_ids=tuple(range(40, 40 + length)),
            trained=(False,) * length,
            group="",
            prompted=True,
            label=label,
        )
        for length, label in ((5, True), (9, False), (7, True))
    ]
    llm.module.save_pretrained(tmp_path)  # its head for labels is unknown to transformers
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, pad_token_id=0, dtype=torch.float32
    )
    with torch.no_grad():
        theirs.score.weight.copy_(llm.class_head)
    total = torch.zeros(())
    for row in rows:
        logits = theirs(input_ids=torch.tensor([row.token_ids])).logits
        total = total + cross_entropy(logits, torch.tensor([int(row.label or False)]))
    (total / 3).backward()
    loss, targets = backward_of_corpus(llm, [rows])
    assert targets == 3
    assert loss == pytest.approx(float(total.detach()) / 3, rel=1e-5)
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    own = {n: p.grad for n, p in llm.trained_parameters().items() if p.grad is not None}
    head = own.pop("class_head.weight")
    torch.testing.assert_close(head, expected.pop("score.weight"), atol=1e-6, rtol=1e-4)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-5, rtol=1e-3)


def test_labels_and_tokens_are_one_mean(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    llm = headed(config)
    corpus = load_corpus(config.data, byte_tokenizer())
    (asked,) = [row for row in corpus.training if row.group == "questions"][:1]
    (said,) = [row for row in corpus.training if row.group == "texts"][:1]
    apart = [backward_of_corpus(llm, [[row]]) for row in (asked, said)]
    whole, targets = backward_of_corpus(llm, [[asked, said]])
    assert targets == 1 + said.num_targets
    assert whole * targets == pytest.approx(sum(loss * count for loss, count in apart), rel=1e-5)
    assert apart[0][0] == pytest.approx(torch.tensor(2.0).log().item())  # a head of zeros


def test_a_weight_counts_as_so_many_rows(tmp_path: Path) -> None:
    config = config_of(tmp_path, "llm.model_name_or_path=tiny:gpt2")
    llm = headed(config)
    corpus = load_corpus(config.data, byte_tokenizer())
    (asked,) = [row for row in corpus.training if row.group == "questions"][:1]
    one, other = [row for row in corpus.training if row.group == "texts"][:2]
    weighted = [replace(asked, weight=4.0), replace(one, weight=3.0), other]
    repeated = [asked] * 4 + [one] * 3 + [other]
    found = []
    for rows in (weighted, repeated):
        loss, _ = backward_of_corpus(llm, [rows])
        found.append((loss, gradients(llm)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_a_source_gives_its_rows_their_weight(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", labelled(40, 0))
    sources = {"a": {"path": path, "weight": 2.5}, "b": {"path": path}}
    tree = {"sources": sources, "max_length": 64, "validation_share": 0}
    corpus = load_corpus(DataConfig.model_validate(tree), byte_tokenizer())
    assert {(row.group, row.weight) for row in corpus.training} == {("a", 2.5), ("b", 1.0)}
    prompts = small_config().prompts.model_copy(
        update={"from_corpus": False, "sources": {"a": SourceConfig(path=path, weight=2.0)}}
    )
    with pytest.raises(ConfigError, match="`weight` of a is for the corpus"):
        load_prompts(prompts, byte_tokenizer(), small_config().data, None)


# Whole --------------------------------------------------------------------------------------------

LONG = (
    "trainer=sft",
    "trainer.iterations=1",
    "trainer.steps_per_iteration=120",
    "trainer.warmup_steps=10",
    "trainer.per_device_train_batch_size=16",
    "trainer.learning_rate=5e-3",
    "evaluation.max_prompts=4",
    "prompts.prompts_per_iteration=4",
)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_leaves_a_head_that_transformers_can_use(tmp_path: Path, *, lora: bool) -> None:
    config = config_of(tmp_path, *LONG, lora=lora)
    detection = detection_of(tmp_path, probe=False)
    evaluation = config.evaluation.model_copy(update={"detection": detection})
    done = run(config.model_copy(update={"evaluation": evaluation}), tmp_path / "run")
    done.write_status("finished")
    base, tuned = results.load(done.evaluation_file)
    assert set(base.detection) == {"answers"}
    assert tuned.detection["head"].measures["AUROC"].mean > 0.9
    columns, rows = results.table([base, tuned])
    assert columns[1:] == ["base", "tuned"]
    assert next(row for row in rows if row[0].startswith("detection, head"))[1] == "–"
    # The folder is a causal model's, without weights that it does not know.
    _, info = AutoModelForCausalLM.from_pretrained(done.final_llm, output_loading_info=True)
    assert not info["unexpected_keys"]
    saved = safetensors.torch.load_file(done.final_llm / "class_head.safetensors")["weight"]
    for folder in (done.final_llm, *([done.final_adapter] if lora else [])):
        assert torch.equal(
            safetensors.torch.load_file(folder / "class_head.safetensors")["weight"], saved
        )
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert '- whether `bad` is at least 0.5, after `"{text}?"`' in card
    theirs = AutoModelForSequenceClassification.from_pretrained(
        done.final_llm, num_labels=2, pad_token_id=0, dtype=torch.float32
    )
    with torch.no_grad():
        theirs.score.weight.copy_(saved)
        for question in load_questions(detection, byte_tokenizer(), None).held_out[:8]:
            logits = theirs(input_ids=torch.tensor([question.token_ids])).logits[0]
            ours = tuned.detection["head"].scores[question.id]
            assert ours == pytest.approx(float(logits[1] - logits[0]), abs=1e-3)
    # Whoever measures the folder, or trains on from it, has the head again.
    again = load_llm(
        config.llm.model_copy(update={"model_name_or_path": str(done.final_llm)}),
        byte_tokenizer(),
        precision="fp32",
        seed=0,
        class_head=True,
    )
    assert again.class_head is not None
    assert torch.equal(again.class_head, saved)
    frozen = load_frozen(plain_config(str(done.final_llm)), precision="fp32")
    assert frozen.class_head is not None
    assert torch.equal(frozen.class_head, saved)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_ends_with_the_same_head(tmp_path: Path, *, lora: bool) -> None:
    config = config_of(tmp_path, lora=lora)
    straight = run(config, tmp_path / "straight")
    stopped(config, tmp_path / "stopped", after=1)
    resumed = go_on(config, tmp_path / "stopped")
    heads = [
        safetensors.torch.load_file(folder.final_llm / "class_head.safetensors")["weight"]
        for folder in (straight, resumed)
    ]
    assert torch.equal(*heads)
    assert float(heads[0].abs().max()) > 0


def updated(world: World, stop: StopRequest, tree: dict[str, Any]) -> dict[str, Tensor]:
    """Trained weights after an update under the constraint, whole."""
    config = Config.model_validate(tree)
    rows = config.trainer.per_device_train_batch_size // world.size
    trainer = config.trainer.model_copy(update={"per_device_train_batch_size": rows})
    config = config.model_copy(update={"trainer": trainer})
    parts = small_parts(config)
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    parts.world = world
    shard_llm(parts, config)
    # A gradient of nothing but rounding, divided by its own size, would be a whole step.
    parts.optimization.optimizer.param_groups[0]["eps"] = 1e-4
    update_llm(parts, target, config, 1)
    return parts.llm.whole_trained()


@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_two_ranks_train_the_head_as_one_does(tmp_path: Path, sharding: str) -> None:
    config = config_of(tmp_path, f"trainer.sharding={sharding}", lora=sharding == "none")
    assert (config.llm.lora == LORA) == (sharding == "none")
    alone = updated(World.alone(), StopRequest(), config.model_dump())
    first, second = together(updated, 2, config.model_dump())
    assert float(alone["class_head.weight"].abs().max()) > 0
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, atol=1e-5, rtol=1e-4, msg=name)
        assert torch.equal(first[name], second[name])
