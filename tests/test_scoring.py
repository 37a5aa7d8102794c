"""Scores are asked for while sampling goes on, once each, and survive on disk."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from small import run, small_config, small_parts

from constrained_ft.distributed import StopRequest, World
from constrained_ft.errors import Interrupted, MissingScoresError, ScorerError
from constrained_ft.progress import Silent
from constrained_ft.rollouts import Rollouts
from constrained_ft.run_folder import RunFolder
from constrained_ft.sampling import sample
from constrained_ft.scorer_config import FunctionScorerConfig
from constrained_ft.scorers import (
    RememberingScorer,
    Score,
    ScoreCache,
    ScoreFailure,
    build_scorer,
    score_all,
)
from constrained_ft.scoring import Scoring
from constrained_ft.train import train


class Watched:
    """Scores by length, slowly, and keeps what it was asked and when."""

    def __init__(self, seconds: float = 0.0, version: str = "1") -> None:
        self.name, self.version = "watched", version
        self.asked: list[tuple[str, str]] = []
        self.calls: list[tuple[float, float, int]] = []
        self._seconds = seconds

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        begun = time.monotonic()
        time.sleep(self._seconds)
        self.asked += zip(prompts, completions, strict=True)
        self.calls.append((begun, time.monotonic(), threading.get_ident()))
        return [
            ScoreFailure("no") if text == "bad" else Score(1 / (1 + len(text)))
            for text in completions
        ]


# What is kept -------------------------------------------------------------------------------------


def kept(inner: Watched, folder: Path, rank: int = 0) -> RememberingScorer:
    own = folder / f"rank_{rank}.sqlite"
    others = [file for file in sorted(folder.glob("*.sqlite")) if file != own]
    return RememberingScorer(inner, ScoreCache(own, others))


def test_a_text_is_asked_for_once_also_after_a_restart(tmp_path: Path) -> None:
    inner = Watched()
    first = score_all(kept(inner, tmp_path), ["p", "p", "q", "p"], ["a", "bb", "a", "a"])
    assert first == [0.5, 1 / 3, 0.5, 0.5]
    assert inner.asked == [("p", "a"), ("p", "bb"), ("q", "a")]
    again = Watched()
    # Another rank reads what the first one paid for.
    scorer = kept(again, tmp_path, rank=1)
    assert score_all(scorer, ["q", "p", "p"], ["a", "ccc", "bb"]) == [0.5, 0.25, 1 / 3]
    assert again.asked == [("p", "ccc")]
    assert (scorer.asked, scorer.known) == (3, 2)


def test_another_version_of_the_scorer_is_asked_again(tmp_path: Path) -> None:
    score_all(kept(Watched(), tmp_path), ["p"], ["a"])
    other = Watched(version="2")
    score_all(kept(other, tmp_path), ["p"], ["a"])
    assert other.asked == [("p", "a")]


def test_a_failed_score_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ScorerError, match="gave no score for sample 1"):
        score_all(kept(Watched(), tmp_path), ["p", "p"], ["a", "bad"])
    again = Watched()
    with pytest.raises(ScorerError, match="gave no score"):
        score_all(kept(again, tmp_path), ["p", "p"], ["a", "bad"])
    assert again.asked == [("p", "bad")]


def test_a_process_that_is_killed_loses_no_score(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from constrained_ft.scorers import RememberingScorer, Score, ScoreCache\n"
        "class One:\n"
        "    name, version = 'watched', '1'\n"
        "    def score(self, prompts, completions):\n"
        "        return [Score(0.5) for _ in completions]\n"
        "scorer = RememberingScorer(One(), ScoreCache(Path(sys.argv[1])))\n"
        "scorer.score(['p'], ['a'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rank_0.sqlite")], check=False)
    assert ran.returncode == -signal.SIGKILL
    again = Watched()
    assert score_all(kept(again, tmp_path), ["p"], ["a"]) == [0.5]
    assert again.asked == []
    # It is a plain SQLite file.
    with sqlite3.connect(tmp_path / "rank_0.sqlite") as file:
        assert file.execute("SELECT scorer, score FROM scores").fetchall() == [("watched 1", 0.5)]


def test_a_wrong_number_of_results_is_said_and_not_kept(tmp_path: Path) -> None:
    class Short(Watched):
        def score(
            self, prompts: Sequence[str], completions: Sequence[str]
        ) -> list[Score | ScoreFailure]:
            return super().score(prompts, completions)[:-1]

    with pytest.raises(ScorerError, match="gave 1 results for 2 completions"):
        score_all(kept(Short(), tmp_path), ["p", "p"], ["a", "bb"])
    assert ScoreCache(tmp_path / "rank_0.sqlite").counts() == {}


def test_a_cache_can_be_counted_cleared_and_refused(tmp_path: Path) -> None:
    scorer = kept(Watched(), tmp_path)
    score_all(scorer, ["p", "p"], ["a", "bb"])
    cache = ScoreCache(tmp_path / "rank_0.sqlite")
    assert cache.counts() == {"watched 1": 2}
    cache.clear()
    assert cache.counts() == {}
    (tmp_path / "broken.sqlite").write_bytes(b"this is no database" * 100)
    with pytest.raises(ScorerError, match=r"cannot use the kept scores in .*broken\.sqlite"):
        ScoreCache(tmp_path / "broken.sqlite")


@pytest.mark.parametrize(
    ("pragma", "said"),
    [
        ("max_page_count = 3", "database or disk is full"),
        ("query_only = 1", "attempt to write a readonly database"),
    ],
)
def test_a_score_that_cannot_be_kept_stops_the_run_and_loses_no_other(
    tmp_path: Path, pragma: str, said: str
) -> None:
    file = tmp_path / "scores.sqlite"
    cache = ScoreCache(file)
    scorer = RememberingScorer(Watched(), cache)
    score_all(scorer, ["p", "p"], ["a", "bb"])
    (own,) = cache._open
    own.execute(f"PRAGMA {pragma}")
    many = [f"{i}" * 50 for i in range(400)]
    message = rf"cannot use the kept scores in .*scores.sqlite: {said}; free space"
    with pytest.raises(ScorerError, match=message) as caught:
        score_all(scorer, ["p"] * len(many), many)
    assert caught.value.exit_code == 3
    assert score_all(scorer, ["p", "p"], ["a", "bb"]) == pytest.approx([1 / 2, 1 / 3])
    cache.close()
    assert ScoreCache(file).counts() == {"watched 1": 2}


# Meanwhile ---------------------------------------------------------------------------------------


def sampled(
    scorer: Watched, stop: StopRequest | None = None, most_missing: float = 0.0
) -> tuple[Rollouts, list[float | None]]:
    config = small_config("sampler.batch_size=4")
    parts = small_parts(config)
    with Scoring([scorer], World.alone(), stop or StopRequest()) as scoring:
        rollouts = sample(
            parts.llm.frozen(),
            parts.prompts.of_iteration(1, 10, 0),
            samples_per_prompt=4,
            max_new_tokens=8,
            sampler=config.sampler,
            seed=0,
            iteration=1,
            display=Silent(),
            stop=stop or StopRequest(),
            each=scoring.begin,
        )
        scorer.sampled_at = time.monotonic()  # type: ignore[attr-defined]
        (scored,) = scoring.finish(rollouts, most_missing)
    return rollouts, scored.scores


def test_scores_are_those_of_the_texts_whatever_the_batches() -> None:
    rollouts, scores = sampled(Watched())
    assert scores == [1 / (1 + len(text)) for text in rollouts.texts]


def test_scoring_begins_while_sampling_goes_on_in_one_thread() -> None:
    scorer = Watched(seconds=0.002)
    sampled(scorer)
    assert len(scorer.calls) == 10
    assert scorer.calls[0][0] < scorer.sampled_at  # type: ignore[attr-defined]
    assert {thread for *_, thread in scorer.calls}.isdisjoint({threading.get_ident()})
    assert len({thread for *_, thread in scorer.calls}) == 1


def test_an_error_of_the_scorer_is_raised_here() -> None:
    class Failing(Watched):
        def score(
            self, prompts: Sequence[str], completions: Sequence[str]
        ) -> list[Score | ScoreFailure]:
            raise ValueError("down")

    with pytest.raises(MissingScoresError, match="it failed with ValueError: down") as caught:
        sampled(Failing(), most_missing=1.0)  # all are too many, whatever is allowed
    assert "the scorer watched gave no score for 40 of 40" in str(caught.value)
    assert caught.value.exit_code == 4


def test_what_failed_is_asked_once_more_and_then_left_out() -> None:
    def kind(text: str) -> int:
        return sum(map(ord, text)) % 5

    class Flaky(Watched):
        def score(
            self, prompts: Sequence[str], completions: Sequence[str]
        ) -> list[Score | ScoreFailure]:
            before = [text for _, text in self.asked]
            results = super().score(prompts, completions)
            return [
                ScoreFailure("not today")
                if kind(text) == 0 or (kind(text) == 1 and text not in before)
                else result
                for text, result in zip(completions, results, strict=True)
            ]

    scorer = Flaky()
    rollouts, scores = sampled(scorer, most_missing=0.9)
    failing = [kind(text) == 0 for text in rollouts.texts]
    assert 0 < sum(failing) < 40
    assert [score is None for score in scores] == failing
    again = len(scorer.asked) - 40
    assert again == sum(kind(text) < 2 for text in rollouts.texts) > sum(failing)
    with pytest.raises(MissingScoresError, match="at last: not today"):
        sampled(Flaky(), most_missing=0.01)


def test_leaving_early_waits_for_the_call_that_has_begun_and_no_other() -> None:
    class Stopped(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            self.polls = 0

        def check(self) -> None:
            self.polls += 1
            if self.polls > 5:
                raise Interrupted("stopped by a test")

    scorer = Watched(seconds=0.3)
    with pytest.raises(Interrupted):
        sampled(scorer, Stopped())
    assert 1 <= len(scorer.calls) <= 2


def test_a_stop_is_noticed_while_scores_are_awaited() -> None:
    class Stopped(StopRequest):
        late = False

        def check(self) -> None:
            if self.late:
                raise Interrupted("stopped by a test")

    stop = Stopped()
    scorer = Watched(seconds=0.5)
    rollouts, _ = sampled(Watched())
    with Scoring([scorer], World.alone(), stop) as scoring:
        for _ in range(3):
            scoring.begin(rollouts)
        stop.late = True
        with pytest.raises(Interrupted):
            scoring.finish(rollouts, 0.0)
    assert len(scorer.calls) == 1  # the one that had begun is paid for, and kept


def test_a_function_may_be_asked_for_many_completions_at_once(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text(
        "import time\n"
        "def score(prompts, completions):\n"
        "    assert len(prompts) == len(completions) == 1\n"
        "    time.sleep(0.1)\n"
        "    return [1 / (1 + len(completions[0]))]\n"
    )
    path = f"{file}:score"
    scorer = build_scorer(FunctionScorerConfig(kind="function", path=path, in_flight=20))
    texts = ["x" * n for n in range(40)]
    begun = time.monotonic()
    assert score_all(scorer, ["p"] * 40, texts) == [1 / (1 + n) for n in range(40)]
    assert time.monotonic() - begun < 2  # 4 when asked one after the other


def test_a_run_that_is_stopped_and_continued_pays_once(tmp_path: Path) -> None:
    file = tmp_path / "paid.py"
    file.write_text(
        f"LOG = {str(tmp_path / 'log')!r}\n"
        "def score(prompts, completions):\n"
        "    with open(LOG, 'a') as log:\n"
        "        log.writelines(repr(pair) + '\\n' for pair in zip(prompts, completions))\n"
        "    return [float('a' not in text) for text in completions]\n"
    )
    config = small_config("constraint=function", f"constraint.scorer.path={file}:score")

    class StopInFit(StopRequest):
        polls = 0

        def check(self) -> None:
            self.polls += 1
            if self.polls == 20:
                raise Interrupted("stopped by a test")

    folder = RunFolder(tmp_path / "run").start(config, ["cft", "train"])
    with pytest.raises(Interrupted):
        train(config, folder, Silent(), StopInFit())
    folder.close()
    folder = RunFolder(tmp_path / "run").resume(config, ["cft", "train"])
    train(config, folder, Silent(), StopRequest())
    folder.close()
    asked = (tmp_path / "log").read_text().splitlines()
    twice = {line for line in asked if asked.count(line) > 1}
    assert twice <= {"('The weather was', ' fine all day.')", "('This is', ' a test.')"}
    straight = run(config.model_copy(update={"output_dir": "x"}), tmp_path / "straight")
    ours = sorted(path.name for path in (tmp_path / "run" / "rollouts").iterdir())
    for name in ours:
        mine = (tmp_path / "run" / "rollouts" / name).read_text()
        assert mine == (straight.path / "rollouts" / name).read_text()
