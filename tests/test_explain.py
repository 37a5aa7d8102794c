"""`cft explain`: its numbers against enumeration, words, and what people see."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser
from small import LENGTH, LETTERS, TABLE, run, small_config
from torch import Tensor
from visit import Scheme, Visit

from constrained_ft.auxiliary import Auxiliary, FrozenAuxiliary
from constrained_ft.cli.main import main
from constrained_ft.compose import compose
from constrained_ft.explain import (
    Choice,
    ExplainedRun,
    Explanation,
    Token,
    Word,
    explain_tokens,
    odds,
    pieces,
    summary,
    words_of,
)
from constrained_ft.explain_page import page
from constrained_ft.tabular import table_llm
from constrained_ft.tiny import byte_tokenizer

SIZE = len(LETTERS)
PROMPT = (0,)


# The numbers --------------------------------------------------------------------------------------


class Exact:
    """A table, a random label of every completion, and all that follows by summing over them."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.llm = table_llm(LETTERS, LENGTH, compose(TABLE).llm, seed=3)
        weight_HV = self.llm.module.table.logits.weight.detach().double().numpy()
        starts = np.cumsum([0, *(SIZE**t for t in range(LENGTH + 1))])
        tables = [weight_HV[starts[t] : starts[t + 1]] for t in range(LENGTH)]
        p = oracle.completion_probs(oracle.softmax(oracle.stopping(tables, stop=0)))
        labels = rng.uniform(0.05, 0.95, size=len(p))
        self.p = oracle.softmax(tables)
        self.satisfaction = oracle.conditional_means(labels, p, SIZE, LENGTH)
        """R after t tokens, for t = 0..LENGTH."""
        self.q = oracle.next_probs(p * labels, SIZE, LENGTH)

    def auxiliary(self, kind: str) -> FrozenAuxiliary:
        """An auxiliary that is exactly this R: each prefix has a mark of its own to tell it by."""
        found = Auxiliary(
            compose([*TABLE, f"auxiliary={kind}", f"auxiliary.rank={SIZE}"]).auxiliary,
            self.llm.module.get_input_embeddings().weight.detach(),
            torch.zeros(SIZE),
            seed=0,
        )
        after = [oracle.logit(level).reshape(-1, SIZE) for level in self.satisfaction[1:]]
        if kind == "additive":
            before = [oracle.logit(level) for level in self.satisfaction[:LENGTH]]
            after = [one - two[:, None] for one, two in zip(after, before, strict=True)]
        hidden_HD = self._hidden().double().numpy()
        solved_DV = np.linalg.lstsq(hidden_HD, np.concatenate(after), rcond=None)[0]
        with torch.no_grad():
            scale = found.embeddings_VD[0, 0]
            found.project_tokens.weight.copy_(torch.eye(SIZE, found.embeddings_VD.shape[1]) / scale)
            found.evidence.weight.copy_(torch.from_numpy(solved_DV.T))
            found.root.bias.fill_(float(oracle.logit(self.satisfaction[0])[0]))
        return found.frozen()

    def _hidden(self) -> Tensor:
        """What the auxiliary sees of every prefix that a token can follow."""
        prefixes = sum(SIZE**t for t in range(LENGTH))
        table = self.llm.module.table
        with torch.no_grad():
            states = torch.cat([table.logits.weight, table.marks_HH], -1)[:prefixes]
        return torch.nn.functional.layer_norm(states, states.shape[-1:])


@pytest.fixture(scope="module")
def exact() -> Exact:
    return Exact()


@pytest.mark.parametrize("kind", ["additive", "head"])
@pytest.mark.parametrize("said", [(1, 2, 3), (3, 3, 0), (2, 0), (1,)])
def test_every_number_is_that_of_enumeration(
    exact: Exact, kind: str, said: tuple[int, ...]
) -> None:
    auxiliary = exact.auxiliary(kind)
    start, tokens = explain_tokens(exact.llm.frozen(), auxiliary, PROMPT, said, SIZE)
    row, before = 0, exact.satisfaction[0][0]
    assert start == pytest.approx(before, abs=1e-5)
    for t, (token, letter) in enumerate(zip(tokens, said, strict=True)):
        p, q = exact.p[t][row], exact.q[t][row]
        row = row * SIZE + letter
        after = exact.satisfaction[t + 1][row]
        change = oracle.logit(np.array(after)) - oracle.logit(np.array(before))
        assert token.evidence == pytest.approx(float(change), abs=1e-4)
        assert token.satisfaction == pytest.approx(after, abs=1e-5)
        assert token.said.p == pytest.approx(p[letter], abs=1e-6)
        assert token.said.q == pytest.approx(q[letter], abs=1e-5)
        assert token.said.ratio == pytest.approx(after / before, rel=1e-3)
        for listed, probs in ((token.of_model, p), (token.of_target, q)):
            assert [LETTERS.index(one.text) for one in listed] == list(np.argsort(-probs))
        assert [one.q for one in token.of_target] == pytest.approx(sorted(q)[::-1], abs=1e-5)
        before = after


@pytest.mark.parametrize("kind", ["additive", "transformer", "head"])
def test_evidence_adds_up_to_what_became_of_the_odds(exact: Exact, kind: str) -> None:
    small = ("auxiliary.rank=4", "auxiliary.width=16", "auxiliary.layers=1")
    random = Auxiliary(
        compose([*TABLE, f"auxiliary={kind}", *small]).auxiliary,
        exact.llm.module.get_input_embeddings().weight.detach(),
        torch.tensor([0.5, -1.0, 0.3, -0.7]),
        seed=1,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in random.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    start, tokens = explain_tokens(exact.llm.frozen(), random.frozen(), PROMPT, (1, 3, 2), 1)
    ends = np.array([start, tokens[-1].satisfaction])
    first, last = np.log(ends / (1 - ends))
    assert sum(token.evidence for token in tokens) == pytest.approx(last - first, abs=1e-4)
    assert len({round(token.evidence, 3) for token in tokens}) == 3


def test_where_r_is_cut_at_its_limit_the_additive_evidence_is_not(exact: Exact) -> None:
    module = Auxiliary(
        compose([*TABLE, "auxiliary=additive"]).auxiliary,
        exact.llm.module.get_input_embeddings().weight.detach(),
        torch.tensor([0.0, 0.0, 0.0, -8.0]),
        seed=0,
    )
    _, tokens = explain_tokens(exact.llm.frozen(), module.frozen(), PROMPT, (3, 3, 3), 1)
    assert [token.evidence for token in tokens] == pytest.approx([-8.0] * 3)


def test_long_texts_are_read_in_parts_to_the_same_numbers(
    exact: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for chunk in (64, 2):
        monkeypatch.setattr("constrained_ft.explain._CHUNK", chunk)
        start, tokens = explain_tokens(
            exact.llm.frozen(), exact.auxiliary("head"), PROMPT, (1, 2, 1), 2
        )
        numbers = [start]
        for one in tokens:
            numbers += [one.evidence, one.satisfaction, *(c.q for c in one.of_target)]
        found.append(numbers)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# Words --------------------------------------------------------------------------------------------


def token(text: str, evidence: float = 0.0, satisfaction: float = 0.5) -> Token:
    choice = Choice(text=text, p=0.5, q=0.25)
    return Token(
        text=text,
        evidence=evidence,
        satisfaction=satisfaction,
        said=choice,
        of_model=(choice,),
        of_target=(choice,),
    )


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([" an", " id", "iot", ",", " too"], [" an", " idiot", ",", " too"]),
        ([" don", "'t", " sh", "*", "t", "!!"], [" don't", " sh*t", "!!"]),
        (["(", "mor", "ons", ")."], ["(", "morons", ")."]),
        ([" ", "b", "ad", "\n", "Go"], [" bad", "\nGo"]),
        ([' "', "oh", '",', " he"], [' "', "oh", '",', " he"]),
    ],
)
def test_tokens_become_words(tokens: list[str], words: list[str]) -> None:
    found = words_of([token(text) for text in tokens])
    assert [word.text for word in found] == words


def test_a_word_has_the_sum_of_its_evidence_and_r_after_its_end() -> None:
    (word,) = words_of([token(" id", -0.4, 0.8), token("iot", -0.7, 0.6)])
    assert word.evidence == pytest.approx(-1.1)
    assert word.satisfaction == 0.6


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30).filter(lambda text: text.isprintable()))
def test_no_part_of_a_text_is_lost_or_cut(text: str) -> None:
    ids = byte_tokenizer()(text)["input_ids"]
    said = pieces(byte_tokenizer(), ids)
    assert "".join(said) == text
    assert len(said) == len(ids)
    words = words_of([token(one) for one in said])
    assert "".join(word.text for word in words) == text
    assert sum(len(word.tokens) for word in words) == len(ids)


def test_the_bytes_of_a_character_stay_together() -> None:
    ids = byte_tokenizer()("a 😀b")["input_ids"]
    assert pieces(byte_tokenizer(), ids) == ["a", " ", "😀", "", "", "", "b"]


# What people see ----------------------------------------------------------------------------------


def explained(*words: Word, prompt: str = "He said", score: float | None = 0.1) -> ExplainedRun:
    one = Explanation(prompt=prompt, satisfaction=0.9, words=words, score=score)
    return ExplainedRun(
        name="runs/<one>",
        auxiliary="additive",
        constraint="words",
        meaning="the chance of a good end",
        texts=(one,),
    )


HOSTILE = (
    Word(tokens=(token(" <script>alert(1)</script>", -3.0, 0.2),)),
    Word(tokens=(token(' "x" onclick=', +1.0, 0.4), token("&amp;", 0.1, 0.5))),
)

SHADES = [("word", evidence) for evidence in (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_shows_hostile_text_as_text() -> None:
    run = explained(*HOSTILE, prompt="<b>bold</b>")
    found = Page(page([run, replace(run, name="other")]))
    names = [name for name, _ in found.tags]
    assert not {"script", "img", "link", "iframe", "b&"} & set(names)
    attributes = {key for _, attrs in found.tags for key in attrs}
    assert not {"src", "onclick"} & attributes
    links = {attrs["href"] for name, attrs in found.tags if name == "a"}
    targets = {f"#{attrs['id']}" for _, attrs in found.tags if "id" in attrs}
    assert links == targets
    assert len(links) == 4
    for said in ("<script>alert(1)</script>", "<b>bold</b>", "runs/<one>", "other", "-3.0"):
        assert said in found.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_quiet_asks_nobody_and_is_fit_for_all(
    browser: Browser, tmp_path: Path, scheme: Scheme
) -> None:
    lines = tuple(
        Word(tokens=(token(f" {text}", evidence, 0.5),))
        for text, evidence in (("\n", 0.0), ("x" * 300, -9.0), ("", 9.0), *SHADES)
    )
    run = explained(*HOSTILE, *lines, prompt="<img src=x onerror='window.hit = 1'>")
    html = tmp_path / "page.html"
    html.write_text(page([run, replace(run, name="other")]), encoding="utf-8")
    visit = Visit(browser, html.as_uri(), scheme=scheme)
    for width in (1280, 380):
        visit.page.set_viewport_size({"width": width, "height": 900})
        assert visit.overflow() <= 0
    assert visit.serious_faults() == []
    # A word leads to its row, by the keyboard too.
    visit.page.locator(".word").first.press("Enter")
    assert visit.page.locator("tr:target").count() == 1
    assert visit.page.evaluate("window.hit") is None
    assert visit.complaints == []
    assert visit.asked == [html.as_uri()]
    visit.page.close()


def test_the_summary_names_the_strongest_word_and_what_is_missing() -> None:
    run = explained(*HOSTILE, score=None)
    said = summary(run.texts[0])
    assert "R goes from 0.90 before the text to 0.50 after it." in said
    assert "“<script>alert(1)</script>” (-3.00: the odds become 20 times smaller)" in said
    assert "The scorer gives no score." in said
    good = explained(Word(tokens=(token("fine", 0.2),)), score=1.0)
    assert "No word speaks against the constraint. The scorer says 1.00." in summary(good.texts[0])


def test_odds_are_said_in_words() -> None:
    assert odds(-np.log(3)) == "3.0 times smaller"
    assert odds(np.log(25)) == "25 times larger"
    assert odds(-14.0) == "over 1,000 times smaller"


# cft explain --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "one"
    folder = run(small_config("trainer.iterations=1"), path)
    folder.write_status("finished", exit_code=0)
    return path


def ask(*arguments: str) -> int:
    try:
        main(["explain", *arguments])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_runs_and_texts_are_shown_side_by_side(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = tmp_path / "other"
    other.symlink_to(finished)
    html = tmp_path / "page.html"
    texts = ("--text", " see me", "--text", " a 😀")
    code = ask(str(finished), *texts, "--prompt", "We", "--html", str(html), str(other))
    assert code == 0
    shown = capsys.readouterr().out
    for said in (" see[", "R goes from", "The scorer says 0.00", "Red words speak against"):
        assert said in shown
    assert shown.count("likeliest of q") == 4
    assert str(finished) not in html.read_text()
    assert Page(html.read_text()).text.count("The scorer says 1.00") == 2


def test_a_text_needs_no_prompt(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(str(finished), "--text", "me", "--alternatives", "1") == 0
    assert "R goes from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "advice"),
    [
        (["nowhere", "--text", "a"], 2, "needs a run"),
        (["RUN", "--text", " "], 3, "a text is empty"),
        (["RUN", "--text", "a" * 300], 3, "give a shorter text"),
        (["RUN", "--text", "a", "--html", "no/such/place.html"], 2, "a folder that exists"),
    ],
)
def test_what_cannot_be_explained_says_why(
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    advice: str,
) -> None:
    assert ask(*(str(finished) if one == "RUN" else one for one in arguments)) == code
    said = capsys.readouterr().err
    assert advice in " ".join(said.split())
    assert said.count("error:") == 1
