"""`cft serve`: what is answered, who is let in, many at once, and the page in a real browser."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser
from small import run, small_config
from visit import Scheme, Visit

from constrained_ft.cli.main import main
from constrained_ft.cli.serve import _rules
from constrained_ft.errors import ScorerError
from constrained_ft.explain import Choice, Token, Word
from constrained_ft.generate import generate_command
from constrained_ft.progress import Silent
from constrained_ft.serve.access import Rules
from constrained_ft.serve.app import PLACES, application
from constrained_ft.serve.explorer import VOICES, Answer, Explorer, Piece, Question, load_explorer

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>"
    "</textarea></section><style>*{display:none}</style>{{ 7 * 7 }} &lt; \u202eback\u2028"
)
LOCAL = Rules(names=frozenset({"test"}))
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("runs") / "small"
    found = run(small_config("trainer.iterations=1", "trainer.steps_per_iteration=8"), path)
    found.write_status("finished", exit_code=0)
    return path


@pytest.fixture(scope="module")
def explorer(folder: Path) -> Explorer:
    return load_explorer(str(folder), Silent())


def question(**changes: Any) -> dict[str, Any]:
    return {"prompt": "The baker opened", "max_new_tokens": NEW} | changes


def exchange(app: Any, *requests: httpx.Request) -> list[httpx.Response]:
    """Send requests to an application, all at once, without a network."""

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, timeout=60) as client:
            return await asyncio.gather(*map(client.send, requests))

    return asyncio.run(send())


def ask(asked: object, headers: dict[str, str] | None = None, path: str = "answers") -> Any:
    url = f"http://test/{path}"
    if isinstance(asked, bytes):
        given = {"content-type": "application/json"} | (headers or {})
        return httpx.Request("POST", url, content=asked, headers=given)
    return httpx.Request("POST", url, json=asked, headers=headers)


def look(path: str = "", **headers: str) -> httpx.Request:
    return httpx.Request("GET", f"http://test/{path}", headers=headers)


def local(explorer: Explorer, rules: Rules = LOCAL) -> Any:
    return application(explorer, rules, lambda: False)


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def answers_of(response: httpx.Response) -> dict[str, dict[str, Any]]:
    """The last of each voice, which has to be what its pieces were."""
    lines = lines_of(response)
    found = {}
    for line in lines:
        if line["kind"] == "answer":
            pieces = [
                one["text"]
                for one in lines
                if one.get("voice") == line["voice"] and one["kind"] == "piece"
            ]
            line["text"] = "".join(word["text"] for word in line["words"])
            # What ends in the middle of a character is shown with the answer alone.
            assert line["text"].startswith("".join(pieces))
            found[line["voice"]] = line
    return found


# What is answered ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_the_voices_say_what_generate_says(folder: Path, explorer: Explorer, seed: int) -> None:
    def generated(*, guided: bool) -> dict[str, object]:
        (row,) = generate_command(
            str(folder),
            prompts=["The baker opened"],
            n=1,
            guided=guided,
            max_new_tokens=NEW,
            seed=seed,
            display=Silent(),
        )
        return row

    (response,) = exchange(local(explorer), ask(question(seed=seed)))
    said = answers_of(response)
    assert set(said) == set(VOICES)
    for voice, row in (("tuned", generated(guided=False)), ("guided", generated(guided=True))):
        assert said[voice]["text"] == row["completion"]
        assert said[voice]["score"] == pytest.approx(row["score"])


def test_the_strength_begins_at_the_tuned_model_and_moves_r_up(explorer: Explorer) -> None:
    def said(strength: float, seed: int) -> dict[str, dict[str, Any]]:
        asked = question(
            voices=["tuned", "guided"], strength=strength, seed=seed, max_new_tokens=24
        )
        return answers_of(exchange(local(explorer), ask(asked))[0])

    gained = 0.0
    for seed in range(4):
        none, most = said(0.0, seed), said(4.0, seed)
        assert none["guided"]["text"] == none["tuned"]["text"] == most["tuned"]["text"]
        assert most["guided"]["text"] != most["tuned"]["text"]
        gained += most["guided"]["words"][-1]["satisfaction"]
        gained -= none["guided"]["words"][-1]["satisfaction"]
    assert gained > 0


def test_the_words_evidence_leads_from_the_first_r_to_the_last(explorer: Explorer) -> None:
    def logit(share: float) -> float:
        return math.log(share / (1 - share))

    (response,) = exchange(local(explorer), ask(question()))
    for answer in answers_of(response).values():
        words = answer["words"]
        change = logit(words[-1]["satisfaction"]) - logit(answer["satisfaction"])
        assert sum(word["evidence"] for word in words) == pytest.approx(change, abs=1e-3)
        assert all(word["tokens"] for word in words)


def test_a_prompt_that_is_too_long_for_the_model_is_said_in_the_stream(explorer: Explorer) -> None:
    (response,) = exchange(local(explorer), ask(question(prompt="long " * 500)))
    (line,) = lines_of(response)
    assert line["kind"] == "error"
    assert "context" in line["error"]


# Hostile requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status", "reason"),
    [
        (b"{", 422, "JSON"),
        (b"", 422, "JSON"),
        (b"[]", 422, "object"),
        (b'"\xff"', 422, "JSON"),
        (b'{"prompt": "\\ud800", "max_new_tokens": 3}', 422, "JSON"),
        (b"[" * 60_000, 422, "JSON"),
        ({"prompt": "a"}, 422, "max_new_tokens"),
        (question(prompt=""), 422, "prompt"),
        (question(prompt=["a"]), 422, "prompt"),
        (question(prompt="a" * 4_001), 422, "4000"),
        (question(prompt="a" * 100_000), 413, "shorten"),
        (b" " * 10_000_000, 413, "shorten"),
        (question(max_new_tokens=0), 422, "max_new_tokens"),
        (question(max_new_tokens=257), 422, "256"),
        (question(max_new_tokens=True), 422, "max_new_tokens"),
        (question(strength=-1), 422, "strength"),
        (question(strength=5), 422, "strength"),
        (b'{"prompt": "a", "max_new_tokens": 3, "strength": NaN}', 422, "strength"),
        (question(seed=2**31), 422, "seed"),
        (question(voices=["everyone"]), 422, "voices"),
        (question(voices=["base"] * 1000), 422, "voices"),
        (question(path="/etc/passwd"), 422, "path"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(
    explorer: Explorer, asked: object, status: int, reason: str
) -> None:
    (response,) = exchange(local(explorer), ask(asked))
    assert response.status_code == status
    assert reason in response.json()["error"]
    assert len(response.text) < 500


@pytest.mark.parametrize("prompt", [HOSTILE, "\x00\x1b[31m", "\U0001f600" * 4_000, " "])
def test_odd_prompts_are_answered_or_refused_in_plain_json(explorer: Explorer, prompt: str) -> None:
    (response,) = exchange(local(explorer), ask(question(prompt=prompt, max_new_tokens=2)))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    assert lines_of(response)[-1]["kind"] in ("answer", "error")
    assert response.text.isascii()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (look(host="evil.example"), 421),
        (look(host="test.evil.example"), 421),
        (look(host="[::1"), 421),
        (look(host=""), 421),
        (look(host="192.168.1.7"), 421),
        (look(host="test:80"), 200),
        (look(origin="http://evil.example"), 403),
        (ask(question(), {"origin": "http://evil.example"}), 403),
        (ask(question(), {"origin": "null"}), 403),
        (ask(question(), {"origin": "http://test"}), 200),
        (ask(question(), {"content-type": "text/plain"}), 415),
        (ask(question(), {"content-type": "application/x-www-form-urlencoded"}), 415),
        (look("answers"), 405),
        (httpx.Request("OPTIONS", "http://test/answers", headers={"origin": "http://a"}), 403),
        (look("../../etc/passwd"), 404),
        (look("page.html"), 404),
    ],
)
def test_other_sites_and_other_names_get_nothing(
    explorer: Explorer, request_: httpx.Request, status: int
) -> None:
    (response,) = exchange(local(explorer), request_)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_with_a_token_nothing_is_shown_without_it(explorer: Explorer) -> None:
    token = "so/secret+x"
    app = local(explorer, Rules(names=LOCAL.names, token=token, cookie="mine"))
    wrong = ["", "x", token[:-1], token + "x", "\x00", "é" * 9]
    for path in ("", "run", "answers"):
        tries = [httpx.URL(f"http://test/{path}").copy_set_param("token", one) for one in wrong]
        requests = [httpx.Request("GET", url) for url in tries]
        requests += [look(path, cookie="mine=x"), look(path, authorization="Bearer x")]
        requests += [look(path, cookie=f"other={token}")]
        refused = exchange(app, *requests, ask(question()))
        assert {one.status_code for one in refused} == {401}
        assert not any("set-cookie" in one.headers for one in refused)
        assert not any(token in one.text for one in refused)


def test_the_address_with_the_token_lets_a_browser_in(explorer: Explorer) -> None:
    app = local(explorer, Rules(names=LOCAL.names, token="secret", cookie="mine"))
    (moved,) = exchange(app, look("?token=secret"))
    assert (moved.status_code, moved.headers["location"]) == (303, "/")
    cookie = moved.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=lax"} <= set(cookie.split("; "))
    kept = cookie.partition(";")[0]
    let_in = [look(cookie=kept), look("run", authorization="Bearer secret")]
    let_in.append(ask(question(), {"cookie": kept}))
    assert {one.status_code for one in exchange(app, *let_in)} == {200}


def test_a_server_that_others_reach_has_a_token_and_one_on_loopback_has_none() -> None:
    for address, others in (("127.0.0.1", False), ("0.0.0.0", True)):
        with socket.create_server((address, 0)) as listener:
            port = listener.getsockname()[1]
            rules, url = _rules(listener, address)
        assert rules.any_address == others
        if others:
            assert rules.token is not None
            assert len(rules.token) > 40
            assert url == f"http://{socket.gethostname()}:{port}/?token={rules.token}"
            with socket.create_server((address, 0)) as listener:
                assert _rules(listener, address)[0].token != rules.token
        else:
            assert (rules.token, url) == (None, f"http://127.0.0.1:{port}/")


def test_any_address_is_no_name(explorer: Explorer) -> None:
    app = local(explorer, Rules(names=frozenset({"box"}), any_address=True))
    hosts = {"192.168.1.7:80": 200, "[fe80::1]:80": 200, "BOX": 200, "1.2.3.4.evil.example": 421}
    answers = exchange(app, *(look(host=host) for host in hosts))
    assert [one.status_code for one in answers] == list(hosts.values())


# Many at once -------------------------------------------------------------------------------------


def test_fifty_at_once_are_answered_or_refused(explorer: Explorer) -> None:
    app = local(explorer)
    responses = exchange(app, *(ask(question(seed=seed)) for seed in range(50)))
    answered = [one for one in responses if one.status_code == 200]
    refused = [one for one in responses if one.status_code == 503]
    assert (len(answered), len(refused)) == (PLACES, 50 - PLACES)
    for one in answered:
        assert set(answers_of(one)) == set(VOICES)
    ahead = [lines_of(one)[0].get("ahead", 0) for one in answered]
    assert ahead == list(range(PLACES))
    for one in refused:
        assert "try again" in one.json()["error"]
        assert int(one.headers["retry-after"]) > 0
    (after,) = exchange(app, ask(question()))
    assert set(answers_of(after)) == set(VOICES)


class Failing(Explorer):
    """Fails in the middle."""

    def answer(self, question: Question) -> Iterator[Piece | Answer]:
        yield Piece(voice="base", text="a")
        if question.seed:
            raise ScorerError("the service is away")
        raise ZeroDivisionError("secret")


def test_a_failure_is_said_and_the_next_one_is_heard(
    explorer: Explorer, caplog: pytest.LogCaptureFixture
) -> None:
    app = local(Failing(**vars(explorer)))
    known, unknown = exchange(app, ask(question(seed=1)), ask(question(seed=0)))
    assert lines_of(known)[-1] == {"kind": "error", "error": "the service is away"}
    assert lines_of(unknown)[-1]["kind"] == "error"
    assert "secret" not in unknown.text
    assert "secret" in caplog.text


# A real server ------------------------------------------------------------------------------------


@contextmanager
def served(explorer: Explorer) -> Iterator[str]:
    """The address of a server in this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    rules, url = _rules(listener, "127.0.0.1")
    app = application(explorer, rules, lambda: server.should_exit)
    server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Slow(Explorer):
    """Takes its time, and counts the tokens."""

    spoken: list[int] = []  # noqa: RUF012

    def answer(self, question: Question) -> Iterator[Piece | Answer]:
        for _ in range(400):
            self.spoken.append(question.seed)
            time.sleep(0.01)
            yield Piece(voice="base", text="a")


def test_who_leaves_makes_room(explorer: Explorer) -> None:
    slow = Slow(**vars(explorer))
    with served(slow) as url:
        with httpx.stream("POST", f"{url}answers", json=question(seed=1)) as response:
            next(response.iter_lines())
        with httpx.stream("POST", f"{url}answers", json=question(seed=2)) as response:
            for _ in zip(range(3), response.iter_lines(), strict=False):
                pass
        # A server that ends does not wait for an answer either.
        spoken = len(slow.spoken)
    assert slow.spoken.count(1) < 200
    assert len(slow.spoken) < spoken + 200


def test_ctrl_c_ends_the_command_cleanly(folder: Path) -> None:
    command = [sys.executable, "-m", "constrained_ft.cli.main", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with httpx.stream("POST", f"{url}answers", json=question(max_new_tokens=200)) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            last = json.loads(list(lines)[-1])
        _, complaints = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in complaints) == (0, False), complaints
    assert last == {"kind": "error", "error": "the server was stopped"}


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "203.0.113.1"])
def test_an_address_that_cannot_be_had_is_2(
    host: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as left:
        main(["serve", str(folder), "--host", host, "--port", str(taken.getsockname()[1])])
    assert left.value.code == 2
    assert "choose another port" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as left:
        main(["serve", "nowhere"])
    assert left.value.code == 3
    assert "pip install 'constrained-ft[serve]'" in capsys.readouterr().err


# The page -----------------------------------------------------------------------------------------


class Hostile(Explorer):
    """Says what a page must not become."""

    def answer(self, question: Question) -> Iterator[Piece | Answer]:
        choice = Choice(text=HOSTILE, p=0.5, q=0.1)
        token = Token(
            text=f" {HOSTILE}",
            evidence=-1.5,
            satisfaction=0.2,
            said=choice,
            of_model=(choice,),
            of_target=(choice,),
        )
        for voice in question.voices:
            yield Piece(voice=voice, text=f" {HOSTILE}")
            yield Answer(voice=voice, words=(Word(tokens=(token,)),), satisfaction=0.5, score=None)


class Asking(Visit):
    """A visit of the page that `cft serve` shows, and the questions that it sent."""

    def __init__(
        self, browser: Browser, url: str, *, width: int = 1280, scheme: Scheme = "light"
    ) -> None:
        super().__init__(browser, url, width=width, scheme=scheme)
        self.sent: list[dict[str, Any]] = []
        self.page.on(
            "request",
            lambda request: (
                self.sent.append(request.post_data_json) if request.method == "POST" else None
            ),
        )
        self.page.get_by_role("heading", level=1, name="small").wait_for()

    def done(self) -> None:
        self.page.get_by_role("status").get_by_text("Done in").wait_for()

    def said(self) -> list[str]:
        return self.page.locator(".said").all_text_contents()


@contextmanager
def visiting(
    browser: Browser, url: str, *, width: int = 1280, scheme: Scheme = "light"
) -> Iterator[Asking]:
    visit = Asking(browser, url, width=width, scheme=scheme)
    yield visit
    visit.page.close()
    assert visit.complaints == []
    assert all(one.startswith((url, "data:")) for one in visit.asked), visit.asked


def test_a_visit(explorer: Explorer, browser: Browser) -> None:
    with served(explorer) as url, visiting(browser, url) as visit:
        page = visit.page
        assert visit.serious_faults() == []
        # A prompt of nothing is not sent.
        page.get_by_role("button", name="Complete").click()
        assert visit.sent == []
        page.get_by_label("Prompt").fill("The baker opened")
        page.get_by_label("Tokens").fill("12")
        page.keyboard.press("Enter")
        visit.done()
        assert visit.sent[-1] == {
            "prompt": "The baker opened",
            "voices": list(VOICES),
            "strength": 1,
            "max_new_tokens": 12,
            "seed": 0,
        }
        first = visit.said()
        assert all(one.startswith("The baker opened") and len(one) > 20 for one in first)
        # A word opens what else could have come, and closes it.
        word = page.locator(".voice").nth(1).locator(".word").first
        word.click()
        panel = page.get_by_role("region", name="A word of tuned")
        assert panel.get_by_role("row").count() > 1
        assert "the odds become" in panel.inner_text()
        assert visit.serious_faults() == []
        word.click()
        assert panel.is_hidden()
        # The slider asks the guided voice alone.
        page.get_by_role("slider").press("End")
        visit.done()
        assert (visit.sent[-1]["voices"], visit.sent[-1]["strength"]) == (["guided"], 4)
        assert visit.said()[:2] == first[:2]
        assert "strength 4" in page.locator(".voice").nth(2).inner_text()
        page.get_by_role("button", name="Next seed").click()
        visit.done()
        assert visit.sent[-1]["seed"] == 1
        assert visit.said()[0] != first[0]
        assert len(visit.sent) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_a_model_says_is_text_and_the_page_is_fit_for_all(
    explorer: Explorer, browser: Browser, scheme: Scheme
) -> None:
    with (
        served(Hostile(**vars(explorer))) as url,
        visiting(browser, url, width=380, scheme=scheme) as visit,
    ):
        page = visit.page
        page.get_by_label("Prompt").fill(HOSTILE)
        page.get_by_role("button", name="Complete").click()
        visit.done()
        assert all(one.endswith(HOSTILE) for one in visit.said())
        for word in page.locator(".word").all():
            word.click()
        assert page.evaluate("window.hit") is None
        assert page.locator("main img, main script, main style").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        page.get_by_text("How to read this").click()
        assert visit.serious_faults() == []


def test_an_answer_is_stopped_and_too_much_is_not_asked(
    explorer: Explorer, browser: Browser
) -> None:
    with served(Slow(**vars(explorer))) as url, visiting(browser, url) as visit:
        page = visit.page
        page.get_by_label("Prompt").fill("on and on")
        page.get_by_role("button", name="Complete").click()
        page.locator(".said", has_text="aaa").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        page.get_by_label("Tokens").fill("9999")
        page.get_by_role("button", name="Complete").click()
        assert len(visit.sent) == 1
