"""The HTTP scorer against a real local server that misbehaves."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty_service
import pytest
from small import SMALL

from constrained_ft import service
from constrained_ft.compose import compose
from constrained_ft.errors import ConfigError, ScorerError
from constrained_ft.scorer_config import HttpScorerConfig
from constrained_ft.scorers import (
    Score,
    ScoreFailure,
    build_scorer,
    probe,
    score_all,
    valid,
)

ROOT = Path(__file__).parent.parent
SECRET = "canary-7f3a-of-the-tests"


def config(url: str, **keys: Any) -> HttpScorerConfig:
    given = {
        "request": {"texts": "{completions}"},
        "answer": "scores[*]",
        "batch_size": 4,
        "timeout": 0.5,
    }
    return HttpScorerConfig(kind="http", url=url, **(given | keys))


class Scripted:
    """A server that answers with what a test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Any = {}
        self.code = 200
        self.more: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.asked.append(json.loads(body))
                outer.headers.append(dict(self.headers.items()))
                found = outer.answer(outer.asked[-1]) if callable(outer.answer) else outer.answer
                data = (found if isinstance(found, str) else json.dumps(found)).encode()
                self.send_response(outer.code)
                for name, value in outer.more.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/judge"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Scripted]:
    one = Scripted()
    yield one
    one.server.shutdown()
    one.server.server_close()


# What is asked and what is read -------------------------------------------------------------------


def test_a_batch_goes_out_as_a_list_and_comes_back_as_one(server: Scripted) -> None:
    server.answer = lambda body: {"scores": [len(text) / 10 for text in body["texts"]]}
    texts = ["a", "bb", "{prompt}", "dddd", "eeeee"]
    assert score_all(build_scorer(config(server.url)), ["p"] * 5, texts) == [
        len(text) / 10 for text in texts
    ]
    assert sorted(len(body["texts"]) for body in server.asked) == [1, 4]


def test_texts_are_put_into_a_template_once(server: Scripted) -> None:
    server.answer = {"value": 0.25}
    scorer = build_scorer(
        config(
            server.url,
            request={"q": ["Say: {prompt}|{completion}", {"whole": "{text}"}], "n": 1},
            answer="value",
            batch_size=1,
        )
    )
    assert score_all(scorer, ["{completion}"], ["{text}"]) == [0.25]
    assert server.asked == [
        {"q": ["Say: {completion}|{text}", {"whole": "{completion}{text}"}], "n": 1}
    ]


def test_the_moderation_preset_reads_the_worst_category(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.answer = {
        "results": [
            {"category_scores": {"hate": 0.1, "violence": 0.7}},
            {"category_scores": {"hate": 0.0, "violence": 0.2}},
        ]
    }
    composed = compose(["constraint=moderation", f"constraint.scorer.url={server.url}"])
    assert composed.constraint.scorer is not None
    scorer = build_scorer(composed.constraint.scorer)
    assert score_all(scorer, ["p", "p"], ["a", "b"]) == pytest.approx([0.3, 0.8])
    assert server.asked == [{"model": "omni-moderation-latest", "input": ["a", "b"]}]
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"


def test_the_guard_preset_reads_the_first_word(server: Scripted) -> None:
    def answer(body: Any) -> Any:
        said = "unsafe\nS10" if "bad" in body["messages"][1]["content"] else " Safe."
        return {"choices": [{"message": {"content": said}}]}

    server.answer = answer
    composed = compose(["constraint=guard", f"constraint.scorer.url={server.url}"])
    assert composed.constraint.scorer is not None
    scorer = build_scorer(composed.constraint.scorer)
    assert score_all(scorer, ["p", "p"], ["good", "bad"]) == [1.0, 0.0]


def test_ranges_and_directions(server: Scripted) -> None:
    server.answer = {"scores": [20, 100]}
    scorer = build_scorer(config(server.url, range=(0, 100), higher_is="violated"))
    assert score_all(scorer, ["p", "p"], ["a", "b"]) == pytest.approx([0.8, 0.0])


# Trouble ------------------------------------------------------------------------------------------


def test_a_faulty_service_gives_the_scores_of_a_sound_one() -> None:
    texts = [f"text number {i}" + "a" * (i % 7) for i in range(400)]
    with faulty_service.FaultyService(latency=0.0, hang=0.7) as service:
        scorer = build_scorer(config(service.url, batch_size=8, in_flight=16))
        assert score_all(scorer, ["p"] * 400, texts) == [
            faulty_service.truth(text) for text in texts
        ]
        assert sum(service.seen.values()) <= 1.6 * 400
        assert len(service.seen) > 5


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "soon"}, None),
        # The server's clock says 10 s, whatever the one here does.
        (
            {
                "date": "Sat, 01 Jan 2000 00:00:00 GMT",
                "retry-after": "Sat, 01 Jan 2000 00:00:10 GMT",
            },
            10.0,
        ),
        ({"retry-after": "Sat, 01 Jan 2000 00:00:10 GMT"}, 0.0),
    ],
)
def test_retry_after_is_read_by_the_servers_clock(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert service._retry_after(headers) == seconds


def test_retry_after_is_obeyed(server: Scripted) -> None:
    times: list[float] = []

    def answer(body: Any) -> Any:
        times.append(time.monotonic())
        server.code = 429 if len(times) == 1 else 200
        server.more = {"Retry-After": "0.4"}
        return {"scores": [0.5] * len(body["texts"])}

    server.answer = answer
    assert score_all(build_scorer(config(server.url)), ["p"], ["a"]) == [0.5]
    assert times[1] - times[0] >= 0.4


def test_one_bad_number_in_a_batch_costs_that_completion_alone(server: Scripted) -> None:
    def answer(body: Any) -> str:
        texts = body["texts"]
        first = len(server.asked) == 1
        return json.dumps(
            {"scores": [float("nan") if first and text == "b" else 0.5 for text in texts]}
        )

    server.answer = answer
    scorer = build_scorer(config(server.url))
    assert score_all(scorer, ["p"] * 3, ["a", "b", "c"]) == [0.5] * 3
    assert [body["texts"] for body in server.asked] == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize(
    ("code", "answer", "message", "calls"),
    [
        (401, "{}", "status 401: is $CFT_TEST_KEY right?", 1),
        (404, "no such page", "status 404: no such page", 1),
        (200, "<html>Sign in</html>", "no JSON but", 3),
        (200, '{"scores": [0.1', "no JSON but", 3),
        (200, {"score": 0.1}, 'no scores[*] in its answer {"score": 0.1}', 3),
        (200, {"scores": []}, "0 values for 1 completions", 3),
        (200, {"scores": [None]}, "it gave no number", 3),
        (200, {"scores": ["0.5"]}, "it gave no number", 3),
        (200, {"scores": [7]}, "it gave 7, outside constraint.scorer.range=[0,1]", 1),
    ],
)
def test_what_is_no_score_is_a_failure_that_says_why(
    server: Scripted,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    answer: Any,
    message: str,
    calls: int,
) -> None:
    monkeypatch.setenv("CFT_TEST_KEY", SECRET)
    server.code, server.answer = code, answer
    scorer = build_scorer(config(server.url, api_key_env="CFT_TEST_KEY", max_malformed=3))
    (result,) = valid(scorer, ["p"], ["a"])
    assert isinstance(result, ScoreFailure)
    assert message in result.error
    assert "127.0.0.1" in result.error
    assert len(server.asked) == calls
    with pytest.raises(ScorerError, match="gave no score for sample 0"):
        score_all(scorer, ["p"], ["a"])


def test_a_service_that_is_down_is_waited_for_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("constrained_ft.service._FIRST_PATIENCE", 1.0)
    with faulty_service.FaultyService(faulty=False) as service:
        port = service.port
    scorer = build_scorer(config(f"http://127.0.0.1:{port}/", patience=20.0, in_flight=4))
    begun = time.monotonic()
    with pytest.raises(ScorerError, match="ConnectError"):  # before training: not for long
        probe(scorer)
    assert time.monotonic() - begun < 4
    with faulty_service.FaultyService(port, faulty=False):
        probe(scorer)
    # It goes down and comes back: nothing is lost.
    found: list[Any] = []
    texts = [f"text {i}" for i in range(40)]
    asking = threading.Thread(target=lambda: found.extend(valid(scorer, ["p"] * 40, texts)))
    asking.start()
    time.sleep(1.5)
    with faulty_service.FaultyService(port, faulty=False) as service:
        asking.join(20)
        tries = sum(service.seen.values())
    assert found == [Score(faulty_service.truth(text)) for text in texts]
    assert tries <= 20
    # It is gone for good: all are given up together, not one after the other.
    scorer = build_scorer(config(f"http://127.0.0.1:{port}/", patience=1.0, in_flight=4))
    begun = time.monotonic()
    many = [f"text {i}" for i in range(400)]
    assert all(isinstance(one, ScoreFailure) for one in valid(scorer, ["p"] * 400, many))
    assert time.monotonic() - begun < 6


def test_waiting_ends_when_it_is_cancelled() -> None:
    with faulty_service.FaultyService(faulty=False) as service:
        scorer = build_scorer(config(service.url, patience=60.0))
        probe(scorer)
    threading.Timer(0.5, scorer.cancel).start()  # type: ignore[attr-defined]
    begun = time.monotonic()
    (result,) = valid(scorer, ["p"], ["a"])
    assert isinstance(result, ScoreFailure)
    assert time.monotonic() - begun < 3


# Secrets and settings -----------------------------------------------------------------------------


def test_a_key_the_service_repeats_is_hidden(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFT_TEST_KEY", SECRET)
    server.code, server.answer = 403, f"the key {SECRET} is not known"
    scorer = build_scorer(config(server.url, api_key_env="CFT_TEST_KEY"))
    (result,) = valid(scorer, ["p"], ["a"])
    assert isinstance(result, ScoreFailure)
    assert "the key *** is not known" in result.error
    assert SECRET not in repr(scorer.name) + scorer.version


def test_a_key_that_is_not_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CFT_TEST_KEY", raising=False)
    with pytest.raises(ScorerError, match=r"export CFT_TEST_KEY=\.\.\."):
        build_scorer(config("http://localhost:1/", api_key_env="CFT_TEST_KEY"))


HTTP = (
    "constraint=http",
    "constraint.scorer.url=http://localhost:1/",
    "constraint.scorer.request={texts: '{completions}'}",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["constraint.scorer.url=ftp://x/"], "constraint.scorer.url"),
        (["constraint.scorer.url=http://me:word@host/"], "constraint.scorer.url"),
        (["constraint.scorer.url='http://host/?api_key=1'"], "looks like a secret"),
        (["+constraint.scorer.headers={X-Api-Key: abc}"], "looks like a secret"),
        (["constraint.scorer.answer=score"], "a batch needs [*]"),
        (["constraint.scorer.request={x: 1}"], "request needs {completion}"),
        (["constraint.scorer.range=[1.0,0.0]"], "must rise"),
        (
            ["constraint.scorer.request={x: '{completion}'}", "constraint.scorer.answer=y"],
            "needs a request with {completions}",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_asked(
    overrides: list[str], message: str
) -> None:
    named = {text.lstrip("+").partition("=")[0] for text in overrides}
    given = [*(text for text in HTTP if text.partition("=")[0] not in named), *overrides]
    with pytest.raises(ConfigError) as caught:
        compose(given)
    assert message in str(caught.value)


# Whole runs ---------------------------------------------------------------------------------------


def train(
    folder: Path, url: str, *overrides: str, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CFT_TEST_KEY": SECRET,
    }
    command = [sys.executable, "-m", "constrained_ft.cli.main", *flags, "train", *SMALL, *HTTP[2:]]
    command += ["constraint=http", f"constraint.scorer.url={url}"]
    command += ["constraint.scorer.api_key_env=CFT_TEST_KEY", "trainer.iterations=2", *overrides]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_run_leaks_no_key_and_a_second_one_asks_for_nothing(tmp_path: Path) -> None:
    with faulty_service.FaultyService(faulty=False, latency=0.0) as service:
        ran = train(
            *(tmp_path, service.url, "output_dir=one", "constraint.satisfied_at=0.2"),
            flags=("--debug", "-v"),
        )
        assert ran.returncode == 0, ran.stderr
        assert all(f"Bearer {SECRET}" in headers.values() for headers in service.headers)
        asked = sum(service.seen.values())
        assert asked > 5
        again = train(tmp_path, service.url, "output_dir=two", "constraint.satisfied_at=0.2")
        assert again.returncode == 0, again.stderr
        assert sum(service.seen.values()) == asked
    one, two = (tmp_path / name / "final/llm/model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 20
    for said in (
        ran.stdout,
        ran.stderr,
        again.stdout,
        *(f.read_bytes().decode("latin-1") for f in files),
    ):
        assert SECRET not in said


def test_a_service_that_is_gone_for_good_ends_the_run_resumably(tmp_path: Path) -> None:
    with faulty_service.FaultyService(faulty=False, latency=0.0) as service:
        url = service.url

        def leave() -> None:
            while not (tmp_path / "run/checkpoints/iteration_0001").exists():
                time.sleep(0.01)
            service.__exit__()

        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        keys = ("constraint.satisfied_at=0.2", "constraint.scorer.patience=1.0", "output_dir=run")
        ran = train(tmp_path, url, *keys, "trainer.iterations=20")
    assert ran.returncode == 4
    assert f"{url} " in ran.stderr or url in ran.stderr
    assert "ConnectError" in ran.stderr
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert status["iteration"] >= 1
    with faulty_service.FaultyService(service.port, faulty=False, latency=0.0):
        again = train(tmp_path, url, *keys, "trainer.iterations=20", "--resume", "run")
    assert again.returncode == 0, again.stderr


def test_waits_grow_with_the_failures_of_all_and_with_refusals_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service.random, "uniform", lambda low, high: high)

    def wait(error: service.Passing, failures: int) -> float:
        outcome = SimpleNamespace(exception=lambda: error)
        return service._pause(SimpleNamespace(outcome=outcome, attempt_number=5), failures)  # type: ignore[arg-type]

    broken, busy = service.Passing("status 500"), service.Passing("status 429", busy=True)
    assert wait(broken, failures=0) == 0.25  # those beside it succeed
    assert wait(broken, failures=2) == 1.0
    assert wait(broken, failures=50) == 4.0
    assert wait(busy, failures=0) == 4.0
    assert wait(service.Passing("status 429", busy=True, wait=2.0), failures=0) == pytest.approx(
        2.2
    )
