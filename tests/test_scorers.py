"""A scorer gives a score or a failure for each completion; only a valid score becomes a number."""

import csv
import importlib
import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from constrained_ft.errors import DataError, ScorerError
from constrained_ft.scorer_config import (
    AllOfScorerConfig,
    AnyOfScorerConfig,
    EmbeddingScorerConfig,
    FunctionScorerConfig,
    LengthScorerConfig,
    LettersScorerConfig,
    LinearScorerConfig,
    NotScorerConfig,
    RegexScorerConfig,
    WeightedScorerConfig,
    WordsScorerConfig,
    is_quick,
)
from constrained_ft.scorers import (
    CombinedScorer,
    Score,
    ScoreFailure,
    Scorer,
    build_scorer,
    given_columns,
    probe,
    probed,
    score_all,
    valid,
)


class Fixed:
    """Gives what the test says, whatever it is asked."""

    name = "fixed"
    version = "1"

    def __init__(self, results: list[Score | ScoreFailure]) -> None:
        self._results = results

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        return self._results


def scores(scorer: Scorer, completions: Sequence[str]) -> list[float]:
    return score_all(scorer, ["a prompt"] * len(completions), completions)


# The only way to numbers --------------------------------------------------------------------------


def test_valid_scores_become_numbers_in_order() -> None:
    assert scores(Fixed([Score(0.0), Score(1.0), Score(0.25)]), ["a", "b", "c"]) == [0.0, 1.0, 0.25]
    assert scores(Fixed([]), []) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Score(float("nan")),
            "gave no score for sample 1 ('second'): it gave nan; a score must lie in [0, 1]",
        ),
        (Score(float("inf")), "gave no score for sample 1 ('second'): it gave inf;"),
        (Score(1.0000001), "gave no score for sample 1 ('second'): it gave 1.0000001;"),
        (Score(-0.1), "gave no score for sample 1 ('second'): it gave -0.1;"),
        (ScoreFailure("no answer"), "gave no score for sample 1 ('second'): no answer"),
    ],
)
def test_anything_else_is_an_error_naming_scorer_and_sample(
    bad: Score | ScoreFailure, message: str
) -> None:
    with pytest.raises(ScorerError, match=re.escape(f"the scorer fixed {message}")) as caught:
        scores(Fixed([Score(0.5), bad]), ["first", "second"])
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_results_is_an_error(count: int) -> None:
    with pytest.raises(ScorerError, match=f"it gave {count} results for 2 completions"):
        scores(Fixed([Score(0.5)] * count), ["a", "b"])


def test_a_scorer_that_raises_is_an_error_naming_it() -> None:
    class Broken(Fixed):
        def score(
            self, prompts: Sequence[str], completions: Sequence[str]
        ) -> list[Score | ScoreFailure]:
            raise RuntimeError("out of order")

    with pytest.raises(ScorerError, match="it failed with RuntimeError: out of order"):
        scores(Broken([]), ["a"])
    with pytest.raises(ScorerError, match="out of order"):
        probe(Broken([]))


def test_long_samples_are_named_by_their_beginning() -> None:
    with pytest.raises(ScorerError) as caught:
        scores(Fixed([ScoreFailure("bad")]), ["x" * 5000])
    assert len(str(caught.value)) < 200


# Letters ------------------------------------------------------------------------------------------


@given(st.text(alphabet="aAbB e\n", max_size=20), st.integers(0, 5))
def test_letters_are_counted_whatever_their_case(text: str, at_most: int) -> None:
    scorer = build_scorer(LettersScorerConfig(kind="letters", letter="A", at_most=at_most))
    count = sum(character in "aA" for character in text)
    assert scores(scorer, [text]) == [1.0 if count <= at_most else 0.0]


# Words --------------------------------------------------------------------------------------------


def words_scorer(**keys: Any) -> Scorer:
    scorer = build_scorer(WordsScorerConfig(kind="words", **keys))
    probe(scorer)
    return scorer


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (True, "that was bad."),
        (True, "BAD!"),
        (True, "bad"),
        (True, "so-bad-it hurts"),
        (True, "it's bad's fault"),
        (False, "badly"),
        (False, "abad"),
        (False, "not_bad"),
        (False, ""),
        (True, "two\n  words here"),
        (True, "Two Words"),
        (False, "two wordsmiths"),
        (False, "twowords"),
        (True, "he said @ss again"),
        (False, "cl@ss"),
        (True, "f**k"),
        (True, "STRASSE"),
        (True, "a.b"),
        (False, "axb"),
    ],
)
def test_whole_words_and_phrases_are_found_whatever_their_case(found: object, text: str) -> None:
    scorer = words_scorer(words=("Bad", "two words", "@ss", "f**k", "straße", "a.b"))
    assert scores(scorer, [text]) == [0.0 if found else 1.0]


@given(st.lists(st.sampled_from(["ab", "a", "abc", "b c", "c"]), min_size=1), st.data())
def test_words_agree_with_a_search_word_by_word(listed: list[str], data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="abc ", max_size=12))
    padded = f" {' '.join(text.split())} "
    expected = not any(f" {word} " in padded for word in listed)
    assert scores(words_scorer(words=tuple(listed)), [text]) == [float(expected)]


def test_a_word_list_is_lines_or_a_column_with_severities(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("mild\n\nsevere\n", encoding="utf-8")
    with (tmp_path / "list.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "severity_rating"])
        writer.writerows([["mild", "1"], ["severe", "2.5"]])
    texts = ["mild", "severe", "given"]
    lines = {"path": str(tmp_path / "list.txt")}
    table = {"path": str(tmp_path / "list.csv")}
    assert scores(words_scorer(**lines), texts) == [0, 0, 1]
    assert scores(words_scorer(**lines, words=("given",)), texts) == [0, 0, 0]
    assert scores(words_scorer(**table), texts) == [0, 0, 1]
    assert scores(words_scorer(**table, min_severity=2), texts) == [1, 0, 1]
    assert scores(words_scorer(**table, ignore=("SEVERE",)), texts) == [0, 1, 1]
    # The version follows the words, not where they came from.
    assert words_scorer(**lines).version == words_scorer(words=("SEVERE", "mild")).version
    assert words_scorer(**lines).version != words_scorer(words=("severe",)).version


def test_word_lists_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    def refused(content: str | bytes, name: str = "list.csv", **keys: Any) -> str:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ScorerError) as caught:
            words_scorer(path=str(tmp_path / name), **keys)
        return str(caught.value)

    assert "empty list" in refused("\n\n", "list.txt")
    assert "empty list" in refused("text,severity_rating\na,1\n", min_severity=2)
    assert "has no column text" in refused("word\na\n")
    assert "has no column severity_rating" in refused("text\na\n", min_severity=2)
    assert "row 2" in refused("text,severity_rating\na,1\nb,high\n", min_severity=2)
    assert "needs a CSV file" in refused("a\n", "list.txt", min_severity=2)
    assert "['b']" in refused("a\n", "list.txt", ignore=("b",))
    assert "UnicodeDecodeError" in refused(b"\xff\xfe\n", "list.txt")
    with pytest.raises(DataError, match="there is no file"):
        words_scorer(path=str(tmp_path / "nowhere.txt"))


# The classifier -----------------------------------------------------------------------------------

SENTENCES = ["You are a wonderful friend.", "You are a fucking idiot.", "", "The weather is fine."]


def test_linear_scores_are_those_of_scikit_learn_on_the_package_s_own_model() -> None:
    joblib = importlib.import_module("joblib")
    folder = Path(str(importlib.import_module("profanity_check").__file__)).parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = joblib.load(folder / "data" / "model.joblib")
        vectorizer = joblib.load(folder / "data" / "vectorizer.joblib")
        toxic = model.predict_proba(vectorizer.transform(SENTENCES))[:, 1]
    scorer = build_scorer(LinearScorerConfig(kind="linear"))
    probe(scorer)
    assert scores(scorer, SENTENCES) == pytest.approx(1 - toxic)
    assert scores(scorer, SENTENCES[:2]) == pytest.approx([1, 0], abs=0.2)
    assert "alt-profanity-check==" in scorer.version


def test_the_prompt_does_not_count() -> None:
    scorer = build_scorer(LinearScorerConfig(kind="linear"))
    same = score_all(scorer, ["You fucking idiot", "My dear"], [" went home."] * 2)
    assert same[0] == same[1]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(ScorerError, match=r"pip install 'constrained-ft\[demo\]'"):
        build_scorer(LinearScorerConfig(kind="linear"))


# Functions ----------------------------------------------------------------------------------------


@pytest.fixture
def function(tmp_path: Path) -> Callable[[str], Scorer]:
    """A scorer out of a file that holds this body of `score(prompts, completions)`."""

    def build(body: str) -> Scorer:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        path = tmp_path / "my_scorer.py"
        path.write_text(f"import numpy as np\n\ndef score(prompts, completions):\n{lines}\n")
        return build_scorer(FunctionScorerConfig(kind="function", path=f"{path}:score"))

    return build


def test_a_function_sees_prompts_and_completions(function: Callable[[str], Scorer]) -> None:
    scorer = function("return [float(p in c) for p, c in zip(prompts, completions)]")
    assert score_all(scorer, ["a", "b"], ["abc", "xyz"]) == [1.0, 0.0]
    assert "my_scorer.py:score" in scorer.name


@pytest.mark.parametrize(
    "body",
    [
        "return [0.5 for _ in completions]",
        "return tuple(np.float32(0.5) for _ in completions)",
        "return np.full(len(completions), 0.5)",
        "return [np.float64(0.5)] * len(completions)",
    ],
)
def test_numbers_of_numpy_are_numbers(function: Callable[[str], Scorer], body: str) -> None:
    assert scores(function(body), ["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.5, None]", "sample 1 ('second'): the function returned None, a NoneType"),
        ("return [0.5, '0.5']", "sample 1 ('second'): the function returned '0.5', a str"),
        ("return [0.5, True]", "sample 1 ('second'): the function returned True; return 1.0 or"),
        ("return np.array([True, False])", "sample 0 ('first'): the function returned True;"),
        ("return [0.5, float('nan')]", "it gave nan; a score must lie"),
        ("return [0.5, 7]", "it gave 7.0; a score must lie"),
        ("return [0.5, [0.5]]", "sample 1 ('second'): the function returned [0.5], a list"),
        ("return [0.5]", "gave 1 results for 2 completions"),
        ("return None", "returned a NoneType; it must return a list of floats"),
        ("return '11'", "returned a str; it must return a list of floats"),
        ("return 0.5", "returned a float; it must return a list of floats"),
        ("x = 1\nreturn completions[9]", "raised IndexError: list index out of range (line 5)"),
    ],
)
def test_what_is_no_score_never_becomes_a_number(
    function: Callable[[str], Scorer], body: str, message: str
) -> None:
    scorer = function(body)
    with pytest.raises(ScorerError, match=re.escape(message)) as caught:
        scores(scorer, ["first", "second"])
    assert "my_scorer.py:score" in str(caught.value)
    with pytest.raises(ScorerError):
        probe(scorer)


def test_the_function_cannot_change_what_is_scored(function: Callable[[str], Scorer]) -> None:
    completions = ["a", "b"]
    scores(function("completions.clear()\nreturn [0.5, 0.5]"), completions)
    assert completions == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("x = 1\n", "score", "the file has no function 'score'"),
        ("score = 3\n", "score", "the file has a int named 'score'"),
        ("a = 1\nraise ValueError('not\\ntoday')\n", "score", "ValueError: not today (line 2)"),
        ("def score(:\n", "score", "SyntaxError: "),
        ("import no_such_package\n", "score", "No module named 'no_such_package' (line 1)"),
        ("import sys\nsys.exit(5)\n", "score", "SystemExit: 5 (line 2)"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, content: str, name: str, message: str
) -> None:
    (tmp_path / "s.py").write_text(content)
    config = FunctionScorerConfig(kind="function", path=f"{tmp_path / 's.py'}:{name}")
    with pytest.raises(ScorerError, match=re.escape(message)) as caught:
        build_scorer(config)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    config = FunctionScorerConfig(kind="function", path=f"{tmp_path}/no.py:score")
    with pytest.raises(ScorerError, match=r"there is no file .*no\.py"):
        build_scorer(config)


def test_a_scorer_file_replaces_no_module_and_can_hold_classes(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(
        "from dataclasses import dataclass\nimport pickle\n"
        "@dataclass\nclass Value:\n    x: float\n"
        "def score(prompts, completions):\n"
        "    return [pickle.loads(pickle.dumps(Value(0.5))).x for _ in completions]\n"
    )
    config = FunctionScorerConfig(kind="function", path=f"{tmp_path}/json.py:score")
    assert scores(build_scorer(config), ["a"]) == [0.5]
    assert sys.modules["json"] is json
    assert pickle.loads(pickle.dumps(np.float64(0.5))) == 0.5


def test_the_version_of_a_function_follows_its_file(function: Callable[[str], Scorer]) -> None:
    one = function("return [0.5 for _ in completions]")
    same = function("return [0.5 for _ in completions]")
    other = function("return [0.6 for _ in completions]")
    assert one.version == same.version != other.version
    # A file that was changed between two runs is read again.
    assert scores(other, ["a"]) == [0.6]


def test_a_function_may_be_called_by_name_or_be_async(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "async def later(prompts, completions, **columns):\n"
        "    return [float(len(columns)) for _ in completions]\n"
        "def by_name(completions, **columns):\n"
        "    return [float(columns['prompts'] == ['p'] * len(completions)) for _ in completions]\n"
        "def by_place(questions, answers):\n"
        "    return [float(q < a) for q, a in zip(questions, answers)]\n"
    )

    def named(name: str) -> Scorer:
        return build_scorer(FunctionScorerConfig(kind="function", path=f"{tmp_path}/f.py:{name}"))

    assert scores(named("later"), ["a", "b"]) == [0.0, 0.0]
    assert score_all(named("by_name"), ["p", "p"], ["a", "b"]) == [1.0, 1.0]
    assert score_all(named("by_place"), ["a", "b"], ["b", "a"]) == [1.0, 0.0]


def test_a_function_gets_the_columns_that_it_takes(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text(
        "def right(prompts, completions, answer, ignored=None, **more):\n"
        "    assert ignored is None and set(more) == {'source'}\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]\n"
        "def plain(prompts, completions):\n"
        "    return [1.0 for _ in completions]\n"
    )
    section = {"kind": "function", "path": f"{tmp_path}/f.py:right"}
    alone = FunctionScorerConfig.model_validate(section)
    scorer = probed(alone)  # not asked yet: it has nothing to be asked with
    (failure,) = valid(scorer, ["2 + 2 ="], [" 4"])
    assert failure == ScoreFailure(
        "the function needs answer; name the columns of your prompts that hold it: "
        "prompts.columns=[answer]"
    )
    columns = {"2 + 2 =": {"answer": "4", "source": "a"}, "1 + 2 =": {"answer": "3", "source": "b"}}
    prompts, texts = ["1 + 2 =", "2 + 2 =", "1 + 2 ="], [" 3", " 3", " 4"]
    for config in (
        alone,
        AllOfScorerConfig.model_validate(
            {
                "kind": "all_of",
                "of": {"right": section, "plain": section | {"path": f"{tmp_path}/f.py:plain"}},
            }
        ),
    ):
        for folder in (None, tmp_path / config.kind):  # with and without a memory
            scorer = probed(config, folder)
            given_columns([scorer], columns)
            assert score_all(scorer, prompts, texts) == [1.0, 0.0, 0.0]
    with pytest.raises(ScorerError, match="the function needs answer"):
        given_columns([probed(alone)], {"2 + 2 =": {"source": "a"}})


def test_a_function_of_a_module_is_found_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_mine.py").write_text(
        "def score(prompts, completions):\n    return [0.5 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = FunctionScorerConfig(kind="function", path="rewards_of_mine:score")
    assert scores(build_scorer(config), ["a"]) == [0.5]
    other = config.model_copy(update={"version": "2"})
    assert build_scorer(other).version != build_scorer(config).version
    with pytest.raises(ScorerError, match="cannot import the module no_such_module_of_mine"):
        build_scorer(FunctionScorerConfig(kind="function", path="no_such_module_of_mine:score"))
    with pytest.raises(ScorerError, match="the module has no function 'nothing'"):
        build_scorer(FunctionScorerConfig(kind="function", path="rewards_of_mine:nothing"))


# Words, disguised ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (True, "sh1t happens"),
        (True, "shiiiit"),
        (True, "s.h.i.t"),
        (True, "S-H-1-T!"),
        (True, "s h i t"),
        (True, "$hit"),
        (False, "shirt"),
        (False, "shitake"),
        (False, "s...h...i...t is spread too far"),
        (False, "the hit"),
    ],
)
def test_simple_disguises_are_seen_through(found: object, text: str) -> None:
    scorer = words_scorer(words=("shit",), obfuscated=True)
    assert scores(scorer, [text]) == [0.0 if found else 1.0]
    if "shit" not in text.lower().split():
        assert scores(words_scorer(words=("shit",)), [text]) == [1.0]


def test_words_may_match_inside_others_or_in_their_case_only() -> None:
    inside = words_scorer(words=("cat",), whole_words=False)
    assert scores(inside, ["concatenate", "dog"]) == [0.0, 1.0]
    exact = words_scorer(words=("Cat",), ignore_case=False)
    assert scores(exact, ["Cat", "cat"]) == [0.0, 1.0]
    assert len({one.version for one in (inside, exact, words_scorer(words=("cat",)))}) == 3


# Regular expressions, lengths, combinations -------------------------------------------------------


@pytest.mark.parametrize(
    ("must", "expected"),
    [
        ("not_contain", [0.0, 0.0, 1.0]),
        ("contain", [1.0, 1.0, 0.0]),
        ("match_whole", [1.0, 0.0, 0.0]),
    ],
)
def test_a_regular_expression_is_looked_for(must: Any, expected: list[int]) -> None:
    scorer = build_scorer(RegexScorerConfig(kind="regex", pattern=r"[A-F]\d+", must=must))
    probe(scorer)
    assert scores(scorer, [" a12 ", "see B7 there", "nothing"]) == expected


@pytest.mark.parametrize(
    ("unit", "text", "count"),
    [
        ("words", " one two  three ", 3),
        ("characters", "  äbc ", 3),
        ("sentences", "One. Two! Three", 3),
        ("sentences", 'He said "no." Then 3.5 came?', 2),
        ("sentences", "", 0),
        ("sentences", "Wait... what?", 2),
        ("tokens", "abc", 3),
    ],
)
def test_lengths_are_counted(unit: Any, text: str, count: int) -> None:
    def holds(at_least: int, at_most: int | None) -> bool:
        config = LengthScorerConfig(
            kind="length",
            unit=unit,
            at_least=at_least,
            at_most=at_most,
            tokenizer="tiny:llama" if unit == "tokens" else None,
        )
        return scores(build_scorer(config), [text]) == [1.0]

    assert holds(count, max(count, 1))
    assert not holds(count + 1, None)
    assert count == 0 or not holds(0, count - 1)


def test_a_graded_length_falls_with_the_distance() -> None:
    config = LengthScorerConfig(kind="length", at_least=2, at_most=4, graded=True)
    texts = [" ".join("x" * n) for n in range(1, 9)]
    wanted = [0.5, 1, 1, 1, 4 / 5, 4 / 6, 4 / 7, 4 / 8]
    assert scores(build_scorer(config), texts) == pytest.approx(wanted)


def holding(letter: str) -> LettersScorerConfig:
    return LettersScorerConfig(kind="letters", letter=letter, at_most=0)


def test_scorers_are_combined() -> None:
    of: Any = {"a": holding("a"), "b": holding("b")}
    texts = ["xy", "a", "b", "ab"]
    cases: list[tuple[Any, list[float]]] = [
        (AllOfScorerConfig(kind="all_of", of=of), [1, 0, 0, 0]),
        (AnyOfScorerConfig(kind="any_of", of=of), [1, 1, 1, 0]),
        (NotScorerConfig(kind="not", of={"a": holding("a")}), [0, 1, 0, 1]),
        (
            WeightedScorerConfig(kind="weighted", of=of, weights={"a": 3.0, "b": 1.0}),
            [1, 0.25, 0.75, 0],
        ),
    ]
    for config, wanted in cases:
        scorer = build_scorer(config)
        probe(scorer)
        assert scores(scorer, texts) == pytest.approx(wanted)
    nested = NotScorerConfig(kind="not", of={"both": cases[0][0]})
    assert scores(build_scorer(nested), texts) == [0, 1, 1, 1]
    versions = {build_scorer(config).version for config, _ in cases}
    assert len(versions) == len(cases)


def test_a_part_that_gives_no_score_leaves_none_and_is_named() -> None:
    parts = {
        "sound": Fixed([Score(1.0), Score(0.0)]),
        "odd": Fixed([Score(0.5), ScoreFailure("no")]),
    }
    scorer = CombinedScorer("all_of", parts)
    first, second = valid(scorer, ["p", "p"], ["a", "b"])
    assert first == Score(0.5)
    assert second == ScoreFailure("odd: no")  # though the sound part alone would decide


def test_quick_scorers_are_those_that_can_score_a_vocabulary() -> None:
    quick = AllOfScorerConfig(kind="all_of", of={"a": holding("a")})
    slow = EmbeddingScorerConfig(kind="embedding", model_name_or_path="m", references=("x",))
    assert is_quick(quick)
    assert is_quick(LinearScorerConfig(kind="linear"))
    assert not is_quick(AllOfScorerConfig(kind="all_of", of={"a": holding("a"), "b": slow}))
    assert not is_quick(FunctionScorerConfig(kind="function", path="f.py:f", in_flight=4))
