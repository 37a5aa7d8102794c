"""Everything a run needs, built once; what is cheap to check is checked before the model loads."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase

from constrained_ft.auxiliary import Auxiliary, ProductAuxiliary, vocabulary_prior
from constrained_ft.config import Config, GuardConfig
from constrained_ft.corpus import Corpus, load_corpus, prompt_and_text
from constrained_ft.detection import Questions, load_questions
from constrained_ft.distributed import StopRequest, World, pack, unpack
from constrained_ft.errors import DivergedError, ScorerError
from constrained_ft.fluency import require_sacrebleu
from constrained_ft.frozen_layers import StatesBelow
from constrained_ft.llm import LLM
from constrained_ft.loading import load_context_length, load_llm, load_tokenizer
from constrained_ft.memory import update_fits
from constrained_ft.optimization import Optimization, build_optimization
from constrained_ft.phases import Phases
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompts, load_prompts
from constrained_ft.randomness import seed_for
from constrained_ft.rollouts import LabeledRollouts
from constrained_ft.run_folder import RunFolder
from constrained_ft.sampling_server import SamplingServer
from constrained_ft.scorer_config import is_quick
from constrained_ft.scorers import Scorer, given_columns, least_scores, probed
from constrained_ft.sources import check_sources

KL_TOLERANCE = 1e-5  # a KL is below zero by no more than this, nats a token


@dataclass(kw_only=True)
class Parts:
    """The moving parts of a run."""

    llm: LLM
    auxiliary: Auxiliary | ProductAuxiliary
    optimization: Optimization
    scorers: tuple[Scorer, ...]
    """One for each term of the constraint, in their order."""
    judges: dict[str, Scorer]
    """Scorers that training never asks, by name."""
    prompts: Prompts
    corpus: Corpus
    questions: Questions | None
    """Labelled texts that are told apart, where `evaluation.detection` names some."""
    display: Display
    stop: StopRequest
    phases: Phases
    server: SamplingServer | None
    """Samples what training learns from, with `sampler.kind: vllm_server`."""
    world: World
    """Who shares this rank's side of the work: all ranks, or with peers those of its side."""
    everyone: World
    """All ranks."""
    kl_weight: float
    """lambda as it stands: `trainer.kl_weight`, or what `trainer.target_rate` made of it."""
    prepared: Mapping[str, float] = field(default_factory=dict)
    """What was scored before the first iteration, under `budget/` of `metrics.METRICS`."""
    faults: int = 0
    """What guards tolerated in a row."""
    memory_estimate: int | None = None
    """Bytes at the peak; known once the base model was measured."""
    replay: list[LabeledRollouts] = field(default_factory=list)
    """What the auxiliary is fitted to, the newest iteration first."""
    states_below: StatesBelow = field(default_factory=StatesBelow)
    """What the layers below the first trained one make of every training prompt; empty until mining
    has read them."""

    def remember(self, labeled: LabeledRollouts, earlier: int) -> None:
        """Put the newest rollouts first and keep so many earlier iterations, what was scored."""
        self.replay = [labeled, *(replace(one, unscored=None) for one in self.replay[:earlier])]

    def tolerate(self, fault: str, guard: GuardConfig, consequence: str) -> None:
        """Go on after a fault, with a note.

        Raises:
            DivergedError: when the configuration says to stop, or there were too many in a row.
        """
        self.faults += 1
        if guard.on_failure == "stop":
            raise DivergedError(fault)
        if self.faults > guard.max_failures:
            raise DivergedError(
                f"{fault} (the last of {self.faults} in a row; guard.max_failures="
                f"{guard.max_failures})"
            )
        self.display.note(f"guard: {fault}; {consequence}")


def build_parts(
    config: Config,
    display: Display,
    stop: StopRequest,
    *,
    folder: RunFolder | None = None,
    world: World | None = None,
) -> Parts:
    """Build everything, the cheap checks first.

    Args:
        config: the whole run.
        display: what people watch.
        stop: polled by every stage.
        folder: of the run, where scores that were paid for are kept, and adapters for a sampling
            server; None keeps none, and asks no such server.
        world: all ranks; None is this process alone.

    Raises:
        DataError: when the corpus or the prompts cannot be used.
        SamplerError: when the sampling server is not there, or takes too few tokens.
        ScorerError: when a scorer does not keep its contract on two fixed strings.
        ModelError: when the model cannot be loaded.
        ConfigError: when two settings contradict each other.
    """
    world = world or World.alone()
    detection = config.evaluation.detection
    check_sources(config.data, config.prompts, detection)
    display.phase("loading", 5)
    server = _sampling_server(config, folder)
    scores = None if folder is None else folder.scores
    terms = config.constraint.all_terms().values()
    scorers = tuple(probed(term.scorer, scores, world.rank) for term in terms)
    judges = {
        name: probed(judge.scorer, scores, world.rank)
        for name, judge in config.evaluation.all_judges().items()
    }
    if config.evaluation.self_bleu:
        require_sacrebleu()
    display.advance()
    tokenizer = load_tokenizer(config.llm)
    corpus = load_corpus(config.data, tokenizer)
    display.advance()
    context = load_context_length(config.llm)
    prompts = load_prompts(config.prompts, tokenizer, config.data, context)
    if server is not None:
        longest = max(len(prompt.token_ids) for prompt in prompts.training)
        server.require_room(longest + config.prompts.max_new_tokens)
    given_columns([*scorers, *judges.values()], prompts.columns)
    questions = None if detection is None else load_questions(detection, tokenizer, context)
    display.advance()
    llm = load_llm(
        config.llm,
        tokenizer,
        precision=config.trainer.precision,
        seed=seed_for(config.seed, "adapters"),
        class_head=config.data.has_class_head,
    )
    if config.llm.gradient_checkpointing == "auto":
        updating = world.size - config.placement.num_learning
        shards = 1 if config.trainer.sharding == "none" else updating
        if not update_fits(llm, prompts, config, shards):
            llm.checkpoint_activations()
    display.advance()
    started, texts = time.monotonic(), 0
    if config.trainer.filter_corpus:
        texts += len(set(corpus.training)) * len(scorers)
        corpus = _filtered(corpus, config, tokenizer, scorers, display, world)
    seconds = time.monotonic() - started
    auxiliary = build_auxiliary(config, llm, tokenizer, scorers, world)
    if config.trainer.learns_target:
        texts += (len(tokenizer) + 1) * len(_scorers_of_prior(config, scorers))
        seconds = time.monotonic() - started
    display.advance()
    return Parts(
        llm=llm,
        auxiliary=auxiliary,
        optimization=build_optimization(llm, config.trainer),
        scorers=scorers,
        judges=judges,
        prompts=prompts,
        corpus=corpus,
        questions=questions,
        display=display,
        stop=stop,
        phases=Phases(llm.slots),
        server=server,
        world=world,
        everyone=world,
        kl_weight=0.0 if config.trainer.is_plain else config.trainer.kl_weight,
        prepared={"budget/seconds": seconds, "budget/scored_texts": float(texts)},
    )


def _sampling_server(config: Config, folder: RunFolder | None) -> SamplingServer | None:
    if config.sampler.kind != "vllm_server" or folder is None:
        return None
    server = SamplingServer(config.sampler, folder.adapters)
    server.probe()
    return server


def shard_llm(parts: Parts, config: Config) -> None:
    """Divide the LLM's weights among the ranks that update it, where the configuration asks.

    The optimizer is made again: it has to move what is there now.
    """
    if config.trainer.sharding == "none":
        return
    if parts.world.size == 1:
        parts.display.note("trainer.sharding: one process updates, so nothing is divided")
        return
    with parts.world.together():
        parts.llm.shard(parts.world)
    parts.optimization = build_optimization(parts.llm, config.trainer)


def _filtered(
    corpus: Corpus,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    scorers: Sequence[Scorer],
    display: Display,
    world: World,
) -> Corpus:
    """The corpus without training rows that violate the constraint, paid for by one rank.

    A row is judged by its trained part, after the rest as the prompt; one without a score stays.
    """
    dropped: list[bool] = []
    if world.leads:
        rows = list(dict.fromkeys(corpus.training))
        asked = [prompt_and_text(row, tokenizer) for row in rows]
        dropped = [False] * len(rows)
        for scorer, term in zip(scorers, config.constraint.all_terms().values(), strict=True):
            scores = least_scores([scorer], [p for p, _ in asked], [t for _, t in asked])
            below = (score is not None and score < term.satisfied_at for score in scores)
            dropped = [a or b for a, b in zip(dropped, below, strict=True)]
        verdicts = dict(zip(rows, dropped, strict=True))
        dropped = [verdicts[row] for row in corpus.training]
    _, told = unpack(world.tell(pack({}, dropped)))
    assert isinstance(told, list)
    display.note(f"filter_corpus: {sum(told):,} of {len(told):,} training rows are left out")
    return corpus.without(told)


def build_auxiliary(
    config: Config,
    llm: LLM,
    tokenizer: PreTrainedTokenizerBase,
    scorers: Sequence[Scorer],
    world: World | None = None,
) -> Auxiliary | ProductAuxiliary:
    """R before the first sample: the vocabulary prior, or nothing."""
    embeddings = llm.module.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    embeddings_VD = embeddings.detach()
    asked = _scorers_of_prior(config, scorers)
    tokens = [[token] for token in range(len(tokenizer))]
    texts = ["", *tokenizer.batch_decode(tokens)] if asked else []

    def one(scorers: Sequence[Scorer], *key: str) -> Auxiliary:
        prior_V = torch.zeros(len(embeddings_VD), device=llm.device)
        if scorers:
            nothing, *scores = _scores_of_texts(texts, scorers, world or World.alone())
            prior_V[: len(scores)] = vocabulary_prior(torch.tensor(scores), nothing)
        seed = seed_for(config.seed, "auxiliary", *key)
        return Auxiliary(config.auxiliary, embeddings_VD, prior_V, seed=seed)

    if config.auxiliary.terms == "joint":
        return one(list(asked.values())).to(llm.device)
    each = [
        one([asked[name]] if name in asked else [], name) for name in config.constraint.all_terms()
    ]
    return ProductAuxiliary(each).to(llm.device)


def _scorers_of_prior(config: Config, scorers: Sequence[Scorer]) -> dict[str, Scorer]:
    """Those that are asked about every token of the vocabulary, by their terms' names."""
    terms, wanted = config.constraint.all_terms(), config.auxiliary.vocabulary_prior
    return {
        name: scorer
        for scorer, (name, term) in zip(scorers, terms.items(), strict=True)
        if wanted is True or (wanted == "auto" and is_quick(term.scorer))
    }


def _scores_of_texts(texts: Sequence[str], scorers: Sequence[Scorer], world: World) -> list[float]:
    """The least score of each text, without a prompt, paid for by one rank.

    The first text is empty; a text without a score counts as that one: it says nothing.

    Raises:
        ScorerError: when the empty text has no score.
    """
    found: list[float] = []
    if world.leads:
        nothing, *scores = least_scores(scorers, [""] * len(texts), texts)
        if nothing is None:
            raise ScorerError(
                f"{' or '.join(one.name for one in scorers)} gives the empty text no score, which "
                "the vocabulary's scores are compared with; use auxiliary.vocabulary_prior=false"
            )
        found = [nothing, *(nothing if score is None else score for score in scores)]
    _, told = unpack(world.tell(pack({}, found)))
    assert isinstance(told, list)
    return told
