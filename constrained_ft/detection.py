"""How well a model tells labelled texts apart: by its answers, its head, a probe of what it knows.

The answers: each text is asked about, and its score is log P(yes) - log P(no) after the question.
The head: where the model has a classification head, how far its logits are apart at the same place.
The probe: a logistic regression on the mean of the last hidden states over the question, fitted to
training texts. It asks nothing of the model, so it also shows what a model knows that was never
trained to answer.

As large a share of the held-out texts is called positive as is positive among the training texts
(`classification.py` says why).

Shape suffixes:  N texts, P scores and a text's features, S slots of a batch, M positions whose
logits are needed, D hidden width, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from constrained_ft.classification import Classification, classification
from constrained_ft.config import DetectionConfig, SourceConfig
from constrained_ft.distributed import StopRequest, World
from constrained_ft.encoding import Encoder
from constrained_ft.errors import ConfigError, DataError
from constrained_ft.llm import FrozenLLM
from constrained_ft.packing import Tree
from constrained_ft.progress import Display
from constrained_ft.records import Completion, Record, records_of

_BATCH_TEXTS = 16
_PENALTY = 0.01  # scikit-learn's C; of 1e-4 to 0.1 the best by cross-validation on training texts


@dataclass(frozen=True, kw_only=True)
class Question:
    """A labelled text, as a model is asked about it."""

    id: str
    """A hash of the question."""
    positive: bool
    token_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], tuple[int, ...]]
    """Token ids of yes and of no."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The labelled texts; none is on both sides."""

    training: tuple[Question, ...]
    held_out: tuple[Question, ...]
    probe: bool
    """Whether a probe is fitted."""


def load_questions(
    config: DetectionConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None
) -> Questions:
    """Read and tokenise the labelled texts; equal ones are used once.

    Raises:
        DataError: if a source is missing, empty or malformed, has one class only, or a question is
            longer than the model's context; None is a model without a limit.
        ConfigError: if a probe is wanted and scikit-learn is not installed.
    """
    if config.probe:
        require_scikit_learn()
    training = _questions("training", config.training, config, tokenizer, context_length)
    known = {question.id for question in training}
    held_out = _questions("held_out", config.held_out, config, tokenizer, context_length)
    fresh = tuple(question for question in held_out if question.id not in known)
    for name, questions in (("training", training), ("held_out", fresh)):
        if len({question.positive for question in questions}) < 2:
            raise DataError(
                f"evaluation.detection.{name}: {len(questions)} texts, which are not of both "
                "classes; see question.label and question.positive_from"
            )
    return Questions(training=training, held_out=fresh, probe=config.probe)


def require_scikit_learn() -> None:
    """See that a probe can be fitted.

    Raises:
        ConfigError: if scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "evaluation.detection.probe=true needs scikit-learn: pip install "
            f"'constrained-ft[demo]' ({error})"
        ) from error


def detect(
    llm: FrozenLLM,
    questions: Questions,
    display: Display,
    stop: StopRequest,
    world: World | None = None,
) -> dict[str, Classification]:
    """What a model's answers (`answers`), its classification head (`head`), where it has one, and a
    probe of it (`probe`) say of the held-out texts.

    Raises:
        Interrupted: when asked to stop.
    """
    world = world or World.alone()
    held_out, training = questions.held_out, questions.training
    asked = [*held_out, *(training if questions.probe else ())]
    display.phase("telling texts apart", len(asked))
    scores, states_ND = read(llm, asked, display, stop, world)
    labels_N = np.array([question.positive for question in training])
    share, count = float(labels_N.mean()), len(held_out)
    by_detector = {detector: scores_N[:count] for detector, scores_N in scores.items()}
    if questions.probe:
        by_detector["probe"] = probe_scores(states_ND[count:], labels_N, states_ND[:count])
    positives = frozenset(question.id for question in held_out if question.positive)
    ids = [question.id for question in held_out]
    return {
        detector: classification(dict(zip(ids, found_N.tolist(), strict=True)), positives, share)
        for detector, found_N in by_detector.items()
    }


def probe_scores(
    training_ND: NDArray[np.float64],
    labels_N: NDArray[np.bool_],
    held_out_ND: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Log-odds of a logistic regression on standardised features, fitted to the first."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_PENALTY, max_iter=1000))
    probe.fit(training_ND, labels_N)
    scores: NDArray[np.float64] = probe.decision_function(held_out_ND)
    return scores


def _questions(
    name: str,
    source: SourceConfig,
    config: DetectionConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
) -> tuple[Question, ...]:
    where = f"evaluation.detection.{name}"
    asked: dict[str, Record] = {}
    in_words = config.question.model_copy(update={"by": "words"})
    for record in records_of(where, source.model_copy(update={"question": in_words})):
        assert isinstance(record.content, Completion)
        asked.setdefault(record.content.prompt, record)
    encoder = Encoder(tokenizer)
    yes, no = (
        encoder.pairs(list(asked), a) for a in (config.question.positive, config.question.negative)
    )
    found = []
    for (text, record), (ids, yes_ids), (_, no_ids) in zip(asked.items(), yes, no, strict=True):
        needed = len(ids) + max(len(yes_ids), len(no_ids))
        if context_length is not None and needed > context_length:
            raise DataError(
                f"{record.origin} has {needed} tokens as a question with its answer, but the "
                f"model's context is {context_length}: set {where}.opening_words"
            )
        assert isinstance(record.content, Completion)
        found.append(
            Question(
                id=hashlib.sha256(text.encode()).hexdigest()[:16],
                positive=record.content.completion == config.question.positive,
                token_ids=ids,
                answers=(yes_ids, no_ids),
            )
        )
    return tuple(found)


@torch.no_grad()
def read(
    llm: FrozenLLM, questions: Sequence[Question], display: Display, stop: StopRequest, world: World
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """The scores of all texts by detector, and the mean of each one's last hidden states."""
    detectors = ("answers",) if llm.class_head is None else ("answers", "head")
    width = llm.head.weight_VD.shape[1]
    found_NP = np.zeros((len(questions), len(detectors) + width))
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].token_ids))
    for start in world.share(range(0, len(order), _BATCH_TEXTS)):
        stop.check()
        places = order[start : start + _BATCH_TEXTS]
        found_NP[places] = _read_batch(llm, [questions[i] for i in places])
        display.advance(len(places) * world.size)  # others are about as far
    whole_NP = np.array(world.totals(found_NP.ravel().tolist())).reshape(found_NP.shape)
    scores = {detector: whole_NP[:, place] for place, detector in enumerate(detectors)}
    return scores, whole_NP[:, len(detectors) :]


def _read_batch(llm: FrozenLLM, questions: Sequence[Question]) -> NDArray[np.float64]:
    # The last token of an answer predicts nothing.
    trees = [
        Tree(stem=one.token_ids, branches=tuple(answer[:-1] for answer in one.answers))
        for one in questions
    ]
    packed = llm.pack(trees)
    states_SD = llm.packed_states(packed).float()
    said_M = torch.tensor([token for one in questions for a in one.answers for token in a])
    logprobs_MV = llm.head(states_SD[torch.cat(packed.paths)]).log_softmax(-1)
    said = logprobs_MV.gather(1, said_M.to(llm.device)[:, None])[:, 0]
    sums = [part.sum() for part in said.split([len(path) for path in packed.paths])]
    rows = []
    for yes, no, stem in zip(sums[::2], sums[1::2], packed.stems, strict=True):
        scores = [(yes - no)[None]]
        if llm.class_head is not None:
            negative, positive = llm.class_head @ states_SD[stem[-1]]
            scores.append((positive - negative)[None])
        rows.append(torch.cat([*scores, states_SD[stem].mean(0)]))
    return torch.stack(rows).double().cpu().numpy()
