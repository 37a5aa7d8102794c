"""lm-eval's evaluation with our models: it asks and counts, log-likelihoods are ours.

The only file that lm-eval has to be installed for when it is imported.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import TemplateLM

from constrained_ft.benchmark_results import BenchmarkResult
from constrained_ft.benchmarks.tasks import Benchmark, quiet_lm_eval
from constrained_ft.distributed import StopRequest
from constrained_ft.errors import ModelError
from constrained_ft.intervals import bootstrap
from constrained_ft.llm import FrozenLLM
from constrained_ft.loglikelihood import loglikelihoods
from constrained_ft.progress import Display

_METRICS = ("acc", "acc_norm")


class _Model(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """What lm-eval asks; texts become tokens as in its own `hf` model."""

    def __init__(self, llm: FrozenLLM, name: str, display: Display, stop: StopRequest) -> None:
        super().__init__()
        self.tokenizer: Any = llm.tokenizer
        self._llm, self._name, self._display, self._stop = llm, name, display, stop

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        found = self.tokenizer.eos_token_id
        if not isinstance(found, int):
            raise ModelError("benchmarks need a tokenizer with an end-of-text token")
        return found

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation that has no context."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,  # noqa: FBT001
        **_: Any,
    ) -> list[int]:
        """Token ids; by default with the tokens that the tokenizer adds, but never two BOS."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(begin)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: FBT001, FBT002
        """As lm-eval does, without its progress bar."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        self._display.phase(self._name, len(requests))
        found = loglikelihoods(
            self._llm,
            [context for _, context, _ in requests],
            [continuation for _, _, continuation in requests],
            self._stop,
            self._display.advance,
        )
        return [(one.log, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002
        """`load_benchmarks` lets no task through that asks this."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        """`load_benchmarks` lets no task through that asks this."""
        raise NotImplementedError


def measure(
    llm: FrozenLLM,
    benchmarks: Sequence[Benchmark],
    limit: int,
    *,
    model: str,
    display: Display,
    stop: StopRequest,
) -> dict[str, BenchmarkResult]:
    """Accuracy of a model on benchmarks, by their names.

    Args:
        llm: the model.
        benchmarks: what `load_benchmarks` gave.
        limit: the first so many items of each task; 0: all.
        model: its name, for the display.
        display: advanced by choices; each benchmark is a phase.
        stop: polled between batches.

    Raises:
        Interrupted: when asked to stop.
    """
    results = {}
    for one in benchmarks:
        with quiet_lm_eval():
            found = evaluator.evaluate(
                _Model(llm, f"evaluating {model}, {one.name}", display, stop),
                {"tasks": dict(one.tasks), "groups": {}, "group_map": {}},
                limit=limit or None,
                bootstrap_iters=0,
            )
        results[one.name] = _result(one, found["samples"])
    return results


def _result(benchmark: Benchmark, samples: dict[str, list[dict[str, Any]]]) -> BenchmarkResult:
    rows = {f"{task}/{row['doc_id']}": row for task in benchmark.tasks for row in samples[task]}
    metrics = {
        name: [float(row[name]) for row in rows.values()]
        for name in _METRICS
        if all(name in row for row in rows.values())
    }
    chosen = all(task.OUTPUT_TYPE == "multiple_choice" for task in benchmark.tasks.values())
    guesses = [1 / len(row["resps"]) for row in rows.values()]
    *_, score = metrics.values()
    return BenchmarkResult(
        items=len(rows),
        metrics={name: bootstrap(values) for name, values in metrics.items()},
        chance=sum(guesses) / len(guesses) if chosen else None,
        by_item=dict(zip(rows, score, strict=True)),
    )
