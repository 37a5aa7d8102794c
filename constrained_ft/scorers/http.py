"""A service that is asked over HTTP for scores; how it is asked is in `service.py`."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from constrained_ft.errors import ScorerError
from constrained_ft.scorer_config import HttpScorerConfig
from constrained_ft.scorers.protocol import Score, ScoreFailure
from constrained_ft.service import Address, Asking, Passing, Service, Unanswered

_WAITING = 4
_PLACEHOLDER = re.compile(r"\{(prompt|completion|text)\}")
_LISTS = {"{prompts}", "{completions}", "{texts}"}
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+|\*)\]")


class HttpScorer:
    """Posts completions and reads the value out of the answers."""

    def __init__(self, config: HttpScorerConfig) -> None:
        """Get ready; nothing is asked yet.

        Raises:
            ScorerError: if httpx or tenacity is missing, or the key's variable is not set.
        """
        self._config = config
        self._path = _steps(config.answer)
        self._service = Service(_address(config))
        parts = urlsplit(config.url)
        self.name = f"http {parts.netloc}{parts.path}"
        asked = config.model_dump_json(
            include={"url", "request", "answer", "verdicts", "higher_is", "range", "version"}
        )
        self.version = f"{config.version} {hashlib.sha256(asked.encode()).hexdigest()[:12]}"

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """What the service says; a failure where it says nothing for too long."""
        self._service.begin()
        pairs = list(zip(prompts, completions, strict=True))
        size = self._config.batch_size
        batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        # More threads than requests: those that wait for another try hold no one up.
        with ThreadPoolExecutor(_WAITING * self._config.in_flight) as threads:
            return [one for batch in threads.map(self._batch, batches) for one in batch]

    def cancel(self) -> None:
        """Return soon: what waits gives up, what is under way may end."""
        self._service.cancel()

    def _batch(self, pairs: list[tuple[str, str]]) -> list[Score | ScoreFailure]:
        """Ask until every completion of a batch has a score, or there is no hope."""
        task = _Task(pairs)
        try:
            self._service.ask(
                lambda asking: self._once(task, asking),
                lambda: task.malformed >= self._config.max_malformed,
            )
        except Unanswered as error:
            task.fail(str(error))
        return task.results()

    def _once(self, task: "_Task", asking: Asking) -> None:
        """One request for what is still missing.

        Raises:
            Passing: when it may help to ask again.
            Final: when it does not.
        """
        asked = task.missing()
        try:
            with self._service.turn(asking):
                body = _filled(self._config.request, asked)
                values = self._read(self._service.json("POST", self._config.url, body), len(asked))
        except Passing as error:
            task.malformed += error.malformed
            raise
        task.malformed += task.take([self._result(value) for value in values])
        if task.missing():
            raise Passing(f"it gave {task.nonsense}", malformed=False)

    def _read(self, tree: Any, count: int) -> list[Any]:
        """The values of the completions asked about."""
        try:
            if "[*]" not in self._config.answer:
                return [_largest(_at(tree, self._path))]
            place = self._path.index("[*]")
            items = _at(tree, self._path[:place])
            if not isinstance(items, list):
                raise LookupError(f"a {type(items).__name__} stands before [*]")
            values = [_largest(_at(item, self._path[place + 1 :])) for item in items]
        except (LookupError, TypeError) as error:
            shown = json.dumps(tree)[:200]
            raise Passing(
                f"no {self._config.answer} in its answer {shown} ({error})", malformed=True
            ) from None
        if len(values) != count:
            raise Passing(f"{len(values)} values for {count} completions", malformed=True)
        return values

    def _result(self, value: Any) -> Score | ScoreFailure | None:
        """A score, a failure that no repetition mends, or None for nonsense."""
        if self._config.verdicts:
            return self._verdict(value)
        if isinstance(value, bool):
            number = self._config.range[1] if value else self._config.range[0]
        elif isinstance(value, int | float) and math.isfinite(value):
            number = float(value)
        else:
            return None
        low, high = self._config.range
        if not low <= number <= high:
            return ScoreFailure(
                f"it gave {number:g}, outside constraint.scorer.range=[{low:g},{high:g}] "
                f"({self._service.where})"
            )
        share = (number - low) / (high - low)
        return Score(share if self._config.higher_is == "satisfied" else 1.0 - share)

    def _verdict(self, value: Any) -> Score | ScoreFailure | None:
        if not isinstance(value, str):
            return None
        said = value.strip().casefold()
        for word, score in self._config.verdicts.items():
            if re.match(rf"{re.escape(word.casefold())}(?!\w)", said):
                return Score(score)
        return None


class _Task:
    """A batch, and what of it is answered."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs
        self._results: list[Score | ScoreFailure | None] = [None] * len(pairs)
        self.malformed = 0
        self.nonsense = "no number"

    def missing(self) -> list[tuple[str, str]]:
        pairs = zip(self._pairs, self._results, strict=True)
        return [pair for pair, result in pairs if result is None]

    def take(self, answers: list[Score | ScoreFailure | None]) -> bool:
        """Keep what came for the missing; True where something of it made no sense."""
        places = [i for i, result in enumerate(self._results) if result is None]
        for place, answer in zip(places, answers, strict=True):
            self._results[place] = answer
        return None in answers

    def fail(self, error: str) -> None:
        self._results = [one or ScoreFailure(error) for one in self._results]

    def results(self) -> list[Score | ScoreFailure]:
        assert None not in self._results
        return [one for one in self._results if one is not None]


def _address(config: HttpScorerConfig) -> Address:
    return Address(
        section="constraint.scorer",
        kind="http",
        error=ScorerError,
        url=config.url,
        timeout=config.timeout,
        patience=config.patience,
        in_flight=config.in_flight,
        requests_per_second=config.requests_per_second,
        headers=config.headers,
        api_key_env=config.api_key_env,
        api_key_header=config.api_key_header,
        api_key_prefix=config.api_key_prefix,
    )


def _filled(template: Any, pairs: list[tuple[str, str]]) -> Any:
    """The request with its placeholders replaced, each once: texts are never read as templates."""
    if isinstance(template, dict):
        return {name: _filled(value, pairs) for name, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, pairs) for value in template]
    if not isinstance(template, str):
        return template
    if template in _LISTS:
        return [_texts(*pair)[template[1:-2]] for pair in pairs]
    texts = _texts(*pairs[0])
    return _PLACEHOLDER.sub(lambda found: texts[found[1]], template)


def _texts(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion, "text": prompt + completion}


def _steps(path: str) -> list[str]:
    """`a.b[0].*` as steps: names, `[0]`, `[*]` and `*`."""
    found = list(_STEP.finditer(path))
    if "".join(step[0] for step in found) != path:
        raise ScorerError(
            f"constraint.scorer.answer={path} is no path; it looks like results[*].scores.toxicity"
        )
    return [step[1] if step[1] is not None else f"[{step[2]}]" for step in found]


def _at(tree: Any, steps: Sequence[str]) -> Any:
    """What stands at a place; where the last step is `*`, all values there.

    Raises:
        LookupError, TypeError: if there is no such place.
    """
    for step in steps:
        if step == "*":
            return list(_values(tree))
        tree = tree[int(step[1:-1])] if step.startswith("[") else tree[step]
    return tree


def _values(tree: Any) -> Iterator[Any]:
    inner = tree.values() if isinstance(tree, dict) else tree
    if not isinstance(tree, dict | list):
        raise TypeError(f"* stands for the values of a section, not of a {type(tree).__name__}")
    for value in inner:
        if isinstance(value, dict | list):
            yield from _values(value)
        else:
            yield value


def _largest(value: Any) -> Any:
    """Of several values the largest; what cannot be compared stays as it is."""
    if not isinstance(value, list):
        return value
    numbers = [v for v in value if isinstance(v, int | float)]
    return max(numbers) if len(numbers) == len(value) > 0 else None
