"""The benchmarks that people name: the tasks of this folder, and those of lm-eval."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from constrained_ft.benchmarks.items import read_items
from constrained_ft.errors import CftError, ConfigError, DataError
from constrained_ft.resources import one_line
from constrained_ft.suggestions import closest

_FOLDER = Path(__file__).parent
_ALL = "all"
_THEIRS = "lm_eval/"
_REFUSED = "realtoxicityprompts"
_LIKELIHOODS = ("multiple_choice", "loglikelihood")
_FEWSHOT_SEED = 1234  # that of lm-eval's own command


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark with its data."""

    name: str
    tasks: Mapping[str, Any]
    """lm-eval's tasks by name: one, or those of a group, whose items count together."""


def packaged() -> tuple[str, ...]:
    """The benchmarks whose data come out of a package wheel."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def check_names(names: Sequence[str]) -> None:
    """See before anything is loaded whether benchmarks can be measured.

    Raises:
        ConfigError: if a benchmark is refused or named twice.
        DataError: if lm-eval is not installed.
    """
    for name in names:
        if name.removeprefix(_THEIRS) == _REFUSED:
            raise _refusal()
    if len(expanded(names)) != len(set(expanded(names))):
        raise ConfigError(f"evaluation.benchmarks names one twice: {', '.join(names)}")
    if not names:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise DataError(
            "evaluation.benchmarks needs lm-evaluation-harness: "
            f"pip install 'constrained-ft[eval]' ({error})"
        ) from error


def expanded(names: Sequence[str]) -> list[str]:
    """With all that are packaged in the place of `all`."""
    return [one for name in names for one in (packaged() if name == _ALL else (name,))]


def load_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Find benchmarks and read their data.

    Args:
        names: `mmlu` is the one packaged here, `lm_eval/mmlu` lm-eval's own of this name; any other
            name is one of lm-eval's, whose data come from the hub. `all`: those packaged here.

    Raises:
        ConfigError: if there is no such benchmark, or it is one that is not measured here.
        DataError: if its data, or lm-eval, are missing.
    """
    check_names(names)
    if not names:
        return []
    from lm_eval.tasks import TaskManager

    ours, theirs = TaskManager(include_path=_FOLDER, include_defaults=False), None
    found = []
    for name in expanded(names):
        if name in packaged():
            manager = ours
        else:
            manager = theirs = theirs or TaskManager()  # reads some 14,000 files
        found.append(_load(manager, name))
    return found


def left_out(benchmarks: Sequence[Benchmark]) -> str | None:
    """How many rows of the packaged files are no items, in words; None where all are."""
    said = []
    for one in benchmarks:
        if one.name in packaged():
            read = read_items(one.tasks[one.name].get_config("dataset_kwargs")["path"])
            if read.broken or read.repeated:
                said.append(f"{one.name} {read.broken} broken, {read.repeated} repeated")
    return f"benchmark rows left out: {'; '.join(said)}" if said else None


def _load(manager: Any, name: str) -> Benchmark:
    own = name.removeprefix(_THEIRS)
    if own not in manager.all_tasks:
        near = closest(own, packaged()) or closest(own, manager.all_tasks)
        raise ConfigError(
            f"evaluation.benchmarks: there is no benchmark {name}; "
            + (f"did you mean {near}? " if near else "")
            + f"Packaged are {', '.join(packaged())}; `lm_eval ls tasks` lists those of the hub"
        )
    with quiet_lm_eval():
        try:
            tasks = manager.load([own])["tasks"]
        except CftError:
            raise
        except Exception as error:
            raise DataError(
                f"cannot read the data of the benchmark {name}: {one_line(error)}; check the "
                "connection, or set HF_HUB_OFFLINE=1 to use the hub's own cache. Packaged are "
                + ", ".join(packaged())
            ) from error
    for key, task in tasks.items():
        _check_task(name, key, task)
        # What lm-eval's own command sets before it evaluates.
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return Benchmark(name=name, tasks=tasks)


def _check_task(name: str, key: str, task: Any) -> None:
    if key == _REFUSED:
        raise _refusal()
    if task.OUTPUT_TYPE not in _LIKELIHOODS or "acc" not in task.aggregation():
        raise ConfigError(
            f"evaluation.benchmarks: {name} is not answered by choosing among texts ({key} is of "
            f"the kind {task.OUTPUT_TYPE}, measured by {', '.join(task.aggregation())}); give "
            "benchmarks with an accuracy of choices, or measure this one with lm-eval itself: "
            f"lm_eval --model hf --model_args pretrained=RUN/final/llm --tasks {name}"
        )


def _refusal() -> ConfigError:
    return ConfigError(
        f"evaluation.benchmarks: {_REFUSED} is not measured through lm-eval, whose task turns "
        "every failure of the scoring service into a toxicity of 0; take `cft evaluate "
        "--evaluation full`, which follows the protocol with scores that may be missing"
    )


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval without its log lines, which advise its own command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
