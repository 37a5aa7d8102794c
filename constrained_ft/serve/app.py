"""The web application: a page, what it shows of the run, and answers as they come.

One prompt is answered at a time; a few wait, and beyond them requests are refused with 503. Answers
are lines of JSON, each of one `kind`: `waiting`, `piece`, `answer`, `error`.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from importlib.resources import files

import anyio
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from constrained_ft.errors import CftError
from constrained_ft.explain import Token, Word, legends, odds
from constrained_ft.explain_page import percent, shown, strength
from constrained_ft.serve.access import Access, Rules, refusal
from constrained_ft.serve.explorer import (
    LONGEST_PROMPT,
    MOST_NEW_TOKENS,
    STRONGEST,
    Answer,
    Explorer,
    Piece,
    Question,
)

PLACES = 4  # requests at once: one is answered, the others wait
_MOST_BYTES = 65_536  # of a request: the longest prompt, all of it escaped, and the rest
_SECONDS_TO_ASK = 10.0  # for a request to arrive

_log = logging.getLogger(__name__)


def application(explorer: Explorer, rules: Rules, stopping: Callable[[], bool]) -> Access:
    """The whole application.

    Args:
        explorer: who answers.
        rules: who may ask.
        stopping: whether the server is about to end; answers then end too.
    """
    page = files("constrained_ft.serve").joinpath("page.html").read_text(encoding="utf-8")
    facts = _facts(explorer)

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page)

    async def show_facts(_: Request) -> Response:
        return JSONResponse(facts)

    routes = [
        Route("/", show_page),
        Route("/run", show_facts),
        Route("/answers", _Answers(explorer, stopping), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _refused})
    return Access(app=app, rules=rules, policy=_policy(page))


class _Answers:
    """Where prompts go to: an ASGI application, because it has to know when a request is over."""

    def __init__(self, explorer: Explorer, stopping: Callable[[], bool]) -> None:
        self._explorer = explorer
        self._stopping = stopping
        self._turn = asyncio.Lock()
        self._present = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        question = await _read_question(Request(scope, receive))
        if self._present >= PLACES:
            raise HTTPException(
                503,
                f"{PLACES} prompts are being answered or wait already; try again in a moment",
                {"Retry-After": "5"},
            )
        ahead = self._present
        self._present += 1
        try:
            async with aclosing(self._lines(question, ahead)) as lines:
                answer = StreamingResponse(lines, media_type="application/x-ndjson")
                await answer(scope, receive, send)
        finally:
            self._present -= 1

    async def _lines(self, question: Question, ahead: int) -> AsyncGenerator[str, None]:
        if ahead:
            yield _line("waiting", ahead=ahead)
        async with self._turn:
            said = self._explorer.answer(question)
            try:
                # One token each in a thread: whoever leaves is noticed between two of them.
                while (one := await anyio.to_thread.run_sync(next, said, None)) is not None:
                    yield _line_of(one)
                    if self._stopping():
                        yield _line("error", error="the server was stopped")
                        return
            except CftError as error:
                yield _line("error", error=str(error))
            except Exception:
                _log.exception("a prompt could not be answered")
                yield _line("error", error="the server failed; its terminal says why")


async def _read_question(request: Request) -> Question:
    """What a request asks.

    Raises:
        HTTPException: when it asks in the wrong way, too much or too slowly.
    """
    # A form of another site could be sent as text, but never as JSON without being asked first.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send the question as application/json")
    body = bytearray()
    try:
        with anyio.fail_after(_SECONDS_TO_ASK):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MOST_BYTES:
                    raise HTTPException(
                        413, f"a question has at most {_MOST_BYTES:,} bytes; shorten the prompt"
                    )
    except TimeoutError:
        raise HTTPException(408, "the question took too long to arrive") from None
    try:
        return Question.model_validate_json(bytes(body), strict=True)
    except ValidationError as error:
        raise HTTPException(422, _first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    """Which field is wrong and why; what was sent is not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = refusal(error.status_code, error.detail)
    answer.headers.update(error.headers or {})
    return answer


def _facts(explorer: Explorer) -> dict[str, object]:
    """What the page shows before anything is asked, and its limits."""
    run = explorer.run
    return {
        "name": run.name,
        "constraint": run.constraint,
        "auxiliary": run.auxiliary,
        "legend": legends([run]),
        "max_new_tokens": explorer.max_new_tokens,
        "most_new_tokens": MOST_NEW_TOKENS,
        "longest_prompt": LONGEST_PROMPT,
        "strongest": STRONGEST,
    }


def _line_of(said: Piece | Answer) -> str:
    match said:
        case Piece():
            return _line("piece", voice=said.voice, text=said.text)
        case Answer():
            return _line(
                "answer",
                voice=said.voice,
                score=said.score,
                satisfaction=said.satisfaction,
                words=[_word(word) for word in said.words],
            )


def _line(kind: str, **content: object) -> str:
    return json.dumps({"kind": kind} | content, allow_nan=False) + "\n"


def _word(word: Word) -> dict[str, object]:
    """A word as the page shows it; `share` is how much of the full colour it gets."""
    return {
        "text": word.text,
        "evidence": word.evidence,
        "share": strength(word.evidence),
        "odds": odds(word.evidence),
        "satisfaction": word.satisfaction,
        "tokens": [_token(token) for token in word.tokens],
    }


def _token(token: Token) -> dict[str, object]:
    """A token among those that could have come, the likeliest of p and of q."""
    could = {token.said, *token.of_model, *token.of_target}
    return {
        "shown": shown(token.text),
        "evidence": token.evidence,
        "choices": [
            {
                "shown": shown(one.text),
                "p": percent(one.p),
                "q": percent(one.q),
                "ratio": f"{one.ratio:.2g}",
                "said": one == token.said,
            }
            for one in sorted(could, key=lambda one: (-one.p, one.text))
        ],
    }


def _policy(page: str) -> str:
    """What the page may do: run its own script and style, known by their hashes, and ask here."""
    allowed = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
