"""Everything a run needs, built once; what is cheap to check is checked before the model loads."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from constrained_ft.auxiliary import Auxiliary, vocabulary_prior
from constrained_ft.config import Config
from constrained_ft.corpus import Corpus, load_corpus
from constrained_ft.distributed import StopRequest, seed_for
from constrained_ft.llm import LLM
from constrained_ft.loading import load_context_length, load_llm, load_tokenizer
from constrained_ft.memory import update_fits
from constrained_ft.optimization import Optimization, build_optimization
from constrained_ft.phases import Phases
from constrained_ft.progress import Display
from constrained_ft.prompts import Prompts, load_prompts
from constrained_ft.rollouts import LabeledRollouts
from constrained_ft.scorers import Scorer, build_scorer, probe, score_all
from constrained_ft.sources import check_sources


@dataclass(kw_only=True)
class Parts:
    """The moving parts of a run."""

    llm: LLM
    auxiliary: Auxiliary
    optimization: Optimization
    scorer: Scorer
    judge: Scorer | None
    prompts: Prompts
    corpus: Corpus
    display: Display
    stop: StopRequest
    phases: Phases
    memory_estimate: int | None = None
    """Bytes at the peak; known once the base model was measured."""
    replay: list[LabeledRollouts] = field(default_factory=list)
    """What the auxiliary is fitted to, the newest iteration first."""

    def remember(self, labeled: LabeledRollouts, earlier: int) -> None:
        """Put the newest rollouts first and keep so many earlier iterations."""
        self.replay = [labeled, *self.replay[:earlier]]


def build_parts(config: Config, display: Display, stop: StopRequest) -> Parts:
    """Build everything, the cheap checks first.

    Raises:
        DataError: when the corpus or the prompts cannot be used.
        ScorerError: when the scorer does not keep its contract on two fixed strings.
        ModelError: when the model cannot be loaded.
        ConfigError: when two settings contradict each other.
    """
    check_sources(config.data, config.prompts)
    display.phase("loading", 5)
    scorer = build_scorer(config.constraint.scorer)
    probe(scorer)
    judge = None if config.evaluation.judge is None else build_scorer(config.evaluation.judge)
    if judge is not None:
        probe(judge)
    display.advance()
    tokenizer = load_tokenizer(config.llm)
    corpus = load_corpus(config.data, tokenizer)
    display.advance()
    context = load_context_length(config.llm)
    prompts = load_prompts(config.prompts, tokenizer, config.data, context)
    display.advance()
    llm = load_llm(
        config.llm,
        tokenizer,
        precision=config.trainer.precision,
        seed=seed_for(config.seed, "adapters"),
    )
    if config.llm.gradient_checkpointing == "auto" and not update_fits(llm, prompts, config):
        llm.checkpoint_activations()
    display.advance()
    auxiliary = build_auxiliary(config, llm, tokenizer, scorer)
    display.advance()
    return Parts(
        llm=llm,
        auxiliary=auxiliary,
        optimization=build_optimization(llm, config.trainer),
        scorer=scorer,
        judge=judge,
        prompts=prompts,
        corpus=corpus,
        display=display,
        stop=stop,
        phases=Phases(llm.slots),
    )


def build_auxiliary(
    config: Config, llm: LLM, tokenizer: PreTrainedTokenizerBase, scorer: Scorer
) -> Auxiliary:
    """R before the first sample: the vocabulary prior, or nothing."""
    embeddings = llm.module.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    embeddings_VD = embeddings.detach()
    prior_V = torch.zeros(len(embeddings_VD), device=llm.device)
    if config.auxiliary.vocabulary_prior:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        nothing, *scores = score_all(scorer, [""] * (len(texts) + 1), ["", *texts])
        prior_V[: len(texts)] = vocabulary_prior(torch.tensor(scores), nothing)
    seed = seed_for(config.seed, "auxiliary")
    auxiliary = Auxiliary(config.auxiliary, embeddings_VD, prior_V, seed=seed)
    return auxiliary.to(llm.device)
