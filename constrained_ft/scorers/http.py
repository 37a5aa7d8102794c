"""A service that is asked over HTTP.

Many requests are in flight at once, fewer while the service says that it is busy (additive
increase, multiplicative decrease). A request is repeated where that can help: after 408, 425, 429
and 5xx, a connection that failed, an answer that took too long or makes no sense; with the wait
that the service asks for, or a random one that grows (exponential backoff, full jitter). When
nothing answers, a circuit breaker lets one request through now and then until one succeeds.
"""

import hashlib
import json
import math
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from constrained_ft.errors import ScorerError
from constrained_ft.scorer_config import HttpScorerConfig
from constrained_ft.scorers.protocol import Score, ScoreFailure

if TYPE_CHECKING:
    import tenacity

_HEALING = {408, 425, 429, 500, 502, 503, 504}
_FIRST_PATIENCE = 15.0  # seconds, until the service has answered for the first time
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 15.0  # seconds
_DOWN_AFTER = 8  # failures in a row
_BUSY_SHARE = 0.35  # of recent answers; above, fewer requests at once
_RECENT = 20  # answers
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
        try:
            import httpx
            import tenacity
        except ImportError as error:
            raise ScorerError(
                "constraint.scorer.kind=http needs httpx and tenacity: "
                f"pip install 'constrained-ft[http]' ({error})"
            ) from error
        self._httpx, self._tenacity = httpx, tenacity
        self._config = config
        self._key = _key(config)
        headers = dict(config.headers)
        if self._key:
            headers[config.api_key_header] = config.api_key_prefix + self._key
        self._client = httpx.Client(
            headers=headers,
            timeout=config.timeout,
            limits=httpx.Limits(max_connections=config.in_flight),
        )
        weakref.finalize(self, self._client.close)
        self._path = _steps(config.answer)
        self._gate = _Gate(config.in_flight, config.requests_per_second)
        self._cancelled = threading.Event()
        parts = urlsplit(config.url)
        self._where = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.name = f"http {parts.netloc}{parts.path}"
        asked = config.model_dump_json(
            include={"url", "request", "answer", "verdicts", "higher_is", "range", "version"}
        )
        self.version = f"{config.version} {hashlib.sha256(asked.encode()).hexdigest()[:12]}"

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """What the service says; a failure where it says nothing for too long."""
        self._cancelled.clear()
        self._gate.hope()
        pairs = list(zip(prompts, completions, strict=True))
        size = self._config.batch_size
        batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        # More threads than requests: those that wait for another try hold no one up.
        with ThreadPoolExecutor(_WAITING * self._config.in_flight) as threads:
            return [one for batch in threads.map(self._batch, batches) for one in batch]

    def cancel(self) -> None:
        """Return soon: what waits gives up, what is under way may end."""
        self._cancelled.set()
        self._gate.wake()

    def _batch(self, pairs: list[tuple[str, str]]) -> list[Score | ScoreFailure]:
        """Ask until every completion of a batch has a score, or there is no hope."""
        task = _Task(pairs)
        patience = self._config.patience
        if not self._gate.has_answered:  # before training nobody wants to wait for minutes
            patience = min(patience, _FIRST_PATIENCE)
        if self._gate.down_for() > patience:  # one wait is enough for all
            task.fail(self._hide(f"{self._gate.last_trouble} ({self._where}, down for good)"))
            return task.results()
        began = time.monotonic()
        retrying = self._tenacity.Retrying(
            retry=self._tenacity.retry_if_exception_type(_Passing),
            stop=lambda _: self._hopeless(task, began + patience),
            wait=lambda state: min(
                _pause(state, self._gate.failures), max(began + patience - time.monotonic(), 0.0)
            ),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            retrying(self._once, task, began + patience)
        except (_Passing, _Final) as error:
            spent = time.monotonic() - began
            told = f"{error} ({self._where}, {task.calls} requests in {spent:.0f} s)"
            task.fail(self._hide(told))
        return task.results()

    def _sleep(self, seconds: float) -> None:
        self._cancelled.wait(seconds)

    def _hopeless(self, task: "_Task", deadline: float) -> bool:
        return (
            self._cancelled.is_set()
            or time.monotonic() >= deadline
            or task.malformed >= self._config.max_malformed
        )

    def _once(self, task: "_Task", deadline: float) -> None:
        """One request for what is still missing.

        Raises:
            _Passing: when it may help to ask again.
            _Final: when it does not.
        """
        if not self._gate.enter(deadline, self._cancelled):
            raise _Passing(self._gate.last_trouble or "no turn came")
        trouble: str | None = None
        busy = False
        try:
            task.calls += 1
            values = self._read(self._post(task.missing()), len(task.missing()))
        except _Passing as error:
            trouble, busy = str(error), error.busy
            task.malformed += error.malformed
            raise
        finally:
            self._gate.leave(trouble, busy=busy)
        task.malformed += task.take([self._result(value) for value in values])
        if task.missing():
            raise _Passing(f"it gave {task.nonsense}", malformed=False)

    def _post(self, pairs: list[tuple[str, str]]) -> Any:
        httpx = self._httpx
        body = _filled(self._config.request, pairs)
        try:
            response = self._client.post(self._config.url, json=body)
        except httpx.TimeoutException:
            raise _Passing(f"no answer within {self._config.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise _Passing(f"{type(error).__name__}: {error}") from None
        code = response.status_code
        said = " ".join(response.text[:200].split())
        if code in _HEALING:
            wait = _retry_after(response.headers.get("retry-after"))
            raise _Passing(f"status {code}", wait=wait, busy=code in {429, 503})
        if code in {401, 403}:
            source = self._config.api_key_env
            hint = f"is ${source} right?" if source else "give the key's variable as api_key_env"
            raise _Final(f"status {code}: {hint} {said}")
        if code != 200:
            raise _Final(f"status {code}: {said}")
        try:
            return response.json()
        except ValueError:
            kind = response.headers.get("content-type", "no content type")
            raise _Passing(f"no JSON but {kind}: {said!r}", malformed=True) from None

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
            raise _Passing(
                f"no {self._config.answer} in its answer {shown} ({error})", malformed=True
            ) from None
        if len(values) != count:
            raise _Passing(f"{len(values)} values for {count} completions", malformed=True)
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
                f"({self._where})"
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

    def _hide(self, text: str) -> str:
        """A service may repeat the key in an error."""
        return text.replace(self._key, "***") if self._key else text


class _Passing(Exception):
    """A failure that may heal."""

    def __init__(
        self, text: str, *, wait: float | None = None, busy: bool = False, malformed: bool = False
    ) -> None:
        super().__init__(text)
        self.wait, self.busy, self.malformed = wait, busy, malformed


class _Final(Exception):
    """A failure that no repetition mends."""


class _Task:
    """A batch, and what of it is answered."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = pairs
        self._results: list[Score | ScoreFailure | None] = [None] * len(pairs)
        self.calls = 0
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


class _Gate:
    """How many requests may be under way, and whether the service seems to be there at all."""

    def __init__(self, most: int, per_second: float | None) -> None:
        self._most, self._limit = most, float(most)
        self._gap = 0.0 if per_second is None else 1.0 / per_second
        self._next = 0.0
        self._inside = 0
        self._failures = 0
        self._down_since: float | None = None
        self._busy = 0.0
        self._since_cut = 0
        self._reopens = 0.0
        self._changed = threading.Condition()
        self.has_answered = False
        self.last_trouble: str | None = None

    def enter(self, deadline: float, cancelled: threading.Event) -> bool:
        """Wait for a turn; False when it did not come in time."""
        with self._changed:
            while True:
                now = time.monotonic()
                if cancelled.is_set() or now >= deadline:
                    return False
                broken = self._failures >= _DOWN_AFTER
                free = 1 if broken else int(self._limit)
                opens = max(self._next, self._reopens if broken else 0.0)
                if self._inside < free and now >= opens:
                    self._inside += 1
                    self._next = max(now, self._next) + self._gap
                    return True
                until = deadline if self._inside >= free else min(deadline, opens)
                self._changed.wait(max(until - now, 0.001))

    def leave(self, trouble: str | None, *, busy: bool) -> None:
        """A request has ended, well or with some trouble."""
        with self._changed:
            self._inside -= 1
            self._adapt(busy=busy)
            if trouble is None or busy:  # one that is busy is there
                self._down_since = None
            elif self._down_since is None:
                self._down_since = time.monotonic()
            if trouble is None:
                self._failures = 0
                self.has_answered = True
            else:
                self.last_trouble = trouble
                if not busy:
                    self._failures += 1
                    over = min(self._failures - _DOWN_AFTER, 6)
                    pause = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** max(over, 0))
                    self._reopens = time.monotonic() + pause
            self._changed.notify_all()

    def _adapt(self, *, busy: bool) -> None:
        """Fewer requests at once where the service turns many away; otherwise slowly more.

        A few refusals cost less than the requests that would not be made.
        """
        self._busy += (float(busy) - self._busy) / _RECENT
        self._since_cut += 1
        if self._busy > _BUSY_SHARE and self._since_cut >= _RECENT:
            self._limit, self._since_cut = max(1.0, self._limit / 2), 0
        elif not busy:
            self._limit = min(float(self._most), self._limit + 1.0 / self._limit)

    @property
    def failures(self) -> int:
        """In a row, of all requests; those that were turned away do not count."""
        with self._changed:
            return self._failures

    def hope(self) -> None:
        """Forget for how long nothing came."""
        with self._changed:
            self._down_since = None

    def down_for(self) -> float:
        """Seconds since anything came, where something is tried."""
        with self._changed:
            return 0.0 if self._down_since is None else time.monotonic() - self._down_since

    def wake(self) -> None:
        """Let those that wait look again."""
        with self._changed:
            self._changed.notify_all()


def _pause(state: "tenacity.RetryCallState", failures: int) -> float:
    """Seconds until the next try: what the service asks for, or a random time that grows.

    Where the service turns requests away the time grows with the tries of this one. Other failures
    say little when those beside them succeed, so there it grows with the failures in a row of all.
    """
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, _Passing) and error.wait is not None:
        return error.wait + random.uniform(0, 0.1 * error.wait)
    tries = state.attempt_number - 1
    if not (isinstance(error, _Passing) and error.busy):
        tries = min(tries, failures)
    most = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(tries, 8))
    return random.uniform(0, most)


def _retry_after(header: str | None) -> float | None:
    """Seconds, from a number or a date; None where there is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _key(config: HttpScorerConfig) -> str:
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ScorerError(
            f"constraint.scorer.api_key_env={config.api_key_env}: this environment variable is not "
            f"set; export {config.api_key_env}=... before starting cft"
        )
    return key


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
