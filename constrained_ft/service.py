"""A service that is asked over HTTP, with patience.

Many requests are in flight at once, fewer while the service says that it is busy (additive
increase, multiplicative decrease). A request is repeated where that can help: after 408, 425, 429
and 5xx, a connection that failed, an answer that took too long or makes no sense; with the wait
that the service asks for, or a random one that grows (exponential backoff, full jitter). When
nothing answers, a circuit breaker lets one request through now and then until one succeeds.
"""

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from constrained_ft.errors import CftError

if TYPE_CHECKING:
    import httpx
    import tenacity

T = TypeVar("T")

HEALING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which it may help to ask again."""

_FIRST_PATIENCE = 15.0  # seconds, until the service has answered for the first time
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 15.0  # seconds
_DOWN_AFTER = 8  # failures in a row
_BUSY_SHARE = 0.35  # of recent answers; above, fewer requests at once
_RECENT = 20  # answers


@dataclass(frozen=True, kw_only=True)
class Address:
    """Whom to ask, and how; most fields are the keys of a section."""

    section: str
    """Dotted path of the section, for messages."""
    kind: str
    """What the section's `kind` says."""
    error: type[CftError]
    """What is raised where the service cannot be asked at all."""
    url: str
    timeout: float
    """Seconds that one request may take."""
    patience: float
    """Seconds after which what has no answer is given up."""
    in_flight: int
    """Requests at once, at most."""
    requests_per_second: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    api_key_env: str | None = None
    api_key_header: str = "Authorization"
    api_key_prefix: str = "Bearer "


@dataclass(kw_only=True)
class Asking:
    """One question, however often it is repeated."""

    deadline: float
    """On the monotonic clock, in seconds."""
    requests: int = 0


class Service:
    """Sends requests and repeats those that may succeed later."""

    def __init__(self, address: Address) -> None:
        """Get ready; nothing is asked yet.

        Raises:
            CftError: `address.error`, if httpx or tenacity is missing or the key's variable is not
                set.
        """
        try:
            import httpx
            import tenacity
        except ImportError as error:
            raise address.error(
                f"{address.section}.kind={address.kind} needs httpx and tenacity: "
                f"pip install 'constrained-ft[http]' ({error})"
            ) from error
        self._httpx, self._tenacity = httpx, tenacity
        self._address = address
        self._key = _key(address)
        headers = dict(address.headers)
        if self._key:
            headers[address.api_key_header] = address.api_key_prefix + self._key
        self._client = httpx.Client(
            headers=headers,
            timeout=address.timeout,
            limits=httpx.Limits(max_connections=address.in_flight),
        )
        weakref.finalize(self, self._client.close)
        self._gate = _Gate(address.in_flight, address.requests_per_second)
        self._cancelled = threading.Event()
        parts = urlsplit(address.url)
        self.where = f"{parts.scheme}://{parts.netloc}{parts.path}"
        """The address, for messages."""

    def begin(self) -> None:
        """Something new is asked: what was cancelled, or was down, is tried again."""
        self._cancelled.clear()
        self._gate.hope()

    def cancel(self) -> None:
        """Return soon: what waits gives up, what is under way may end."""
        self._cancelled.set()
        self._gate.wake()

    def ask(self, once: Callable[[Asking], T], gives_up: Callable[[], bool]) -> T:
        """Call `once` until it returns, or there is no hope.

        Args:
            once: sends requests, each in a `turn`; raises `Passing` or `Final`.
            gives_up: whether another try is pointless.

        Raises:
            Unanswered: saying what the service did at last.
        """
        patience = self._address.patience
        if not self._gate.has_answered:  # before training nobody wants to wait for minutes
            patience = min(patience, _FIRST_PATIENCE)
        if self._gate.down_for() > patience:  # one wait is enough for all
            said = self._hide(f"{self._gate.last_trouble} ({self.where}, down for good)")
            raise Unanswered(said)
        began = time.monotonic()
        asking = Asking(deadline=began + patience)
        retrying = self._tenacity.Retrying(
            retry=self._tenacity.retry_if_exception_type(Passing),
            stop=lambda _: self._hopeless(asking) or gives_up(),
            wait=lambda state: min(
                _pause(state, self._gate.failures), max(asking.deadline - time.monotonic(), 0.0)
            ),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(once, asking)
        except (Passing, Final) as error:
            spent = time.monotonic() - began
            told = f"{error} ({self.where}, {asking.requests} requests in {spent:.0f} s)"
            raise Unanswered(self._hide(told)) from None

    @contextmanager
    def turn(self, asking: Asking) -> Iterator[None]:
        """Wait until a request may be sent; what goes wrong inside counts against the service.

        Raises:
            Passing: when no turn came in time.
        """
        if not self._gate.enter(asking.deadline, self._cancelled):
            raise Passing(self._gate.last_trouble or "no turn came")
        trouble: str | None = None
        busy = False
        try:
            asking.requests += 1
            yield
        except Passing as error:
            trouble, busy = str(error), error.busy
            raise
        finally:
            self._gate.leave(trouble, busy=busy)

    def send(
        self,
        method: str,
        url: str,
        body: Any = None,
        *,
        timeout: float | None = None,
        heals: frozenset[int] = HEALING,
    ) -> "httpx.Response":
        """One request; only an answer with status 200 is returned.

        Args:
            method: GET or POST.
            url: where to.
            body: sent as JSON.
            timeout: seconds it may take; None is what the address says.
            heals: statuses after which it may help to ask again.

        Raises:
            Passing: when it may help to ask again.
            Final: when it does not.
        """
        httpx = self._httpx
        try:
            response = self._client.request(
                method, url, json=body, timeout=timeout or self._address.timeout
            )
        except httpx.TimeoutException:
            raise Passing(f"no answer within {self._address.timeout:g} s") from None
        except httpx.HTTPError as error:
            raise Passing(f"{type(error).__name__}: {error}") from None
        code = response.status_code
        said = " ".join(response.text[:200].split())
        if code in heals:
            wait = _retry_after(response.headers)
            raise Passing(f"status {code}", wait=wait, busy=code in {429, 503})
        if code in {401, 403}:
            source = self._address.api_key_env
            hint = f"is ${source} right?" if source else "give the key's variable as api_key_env"
            raise Final(f"status {code}: {hint} {said}", status=code)
        if code != 200:
            raise Final(f"status {code}: {said}", status=code)
        return response

    def json(self, method: str, url: str, body: Any = None) -> Any:
        """What is answered to one request, read as JSON.

        Raises:
            Passing: when it may help to ask again.
            Final: when it does not.
        """
        response = self.send(method, url, body)
        try:
            return response.json()
        except ValueError:
            kind = response.headers.get("content-type", "no content type")
            said = " ".join(response.text[:200].split())
            raise Passing(f"no JSON but {kind}: {said!r}", malformed=True) from None

    def _sleep(self, seconds: float) -> None:
        self._cancelled.wait(seconds)

    def _hopeless(self, asking: Asking) -> bool:
        return self._cancelled.is_set() or time.monotonic() >= asking.deadline

    def _hide(self, text: str) -> str:
        """A service may repeat the key in an error."""
        return text.replace(self._key, "***") if self._key else text


class Unanswered(Exception):
    """Nothing usable came, and asking again will not help."""


class Passing(Exception):
    """A failure that may heal."""

    def __init__(
        self, text: str, *, wait: float | None = None, busy: bool = False, malformed: bool = False
    ) -> None:
        super().__init__(text)
        self.wait, self.busy, self.malformed = wait, busy, malformed


class Final(Exception):
    """A failure that no repetition mends."""

    def __init__(self, text: str, *, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status
        """The answer's, where there is one."""


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
    if isinstance(error, Passing) and error.wait is not None:
        return error.wait + random.uniform(0, 0.1 * error.wait)
    tries = state.attempt_number - 1
    if not (isinstance(error, Passing) and error.busy):
        tries = min(tries, failures)
    most = min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(tries, 8))
    return random.uniform(0, most)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from a number or a date; None where there is neither.

    A date is compared with the server's own clock, where it tells it: this one may be wrong.
    """
    header = headers.get("retry-after")
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        said = headers.get("date")
        now = time.time() if said is None else parsedate_to_datetime(said).timestamp()
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except (TypeError, ValueError):
        return None


def _key(address: Address) -> str:
    if address.api_key_env is None:
        return ""
    key = os.environ.get(address.api_key_env, "").strip()
    if not key:
        raise address.error(
            f"{address.section}.api_key_env={address.api_key_env}: this environment variable is "
            f"not set; export {address.api_key_env}=... before starting cft"
        )
    return key
