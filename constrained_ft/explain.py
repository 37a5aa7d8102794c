"""Look at a text through a run's auxiliary: what speaks against the constraint, what q* would say.

Shape suffixes:  T tokens of the text, V vocabulary, D hidden width.

At every token three things are read off, all of the run's final model p and its auxiliary R:

    evidence        logit R(x, y_<=t) - logit R(x, y_<t), what the token does to the odds
    R               R(x, y_<=t), after the token
    p, q            the next-token distributions before it; q(v) ∝ p(v) R(x, y_<t v)

A word is often several tokens. The evidence of a word is the sum of theirs: the logits between
them cancel, so it is what the whole word does to the odds.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from constrained_ft import equations
from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.config import Config
from constrained_ft.encoding import Encoder
from constrained_ft.errors import DataError
from constrained_ft.llm import FrozenLLM
from constrained_ft.named_models import final_model, finished_run, scorers_of
from constrained_ft.progress import Display
from constrained_ft.scorers import least_scores

_CHUNK = 64  # positions whose whole vocabulary is in memory at once
# A word with what joins it (don't, semi-final, sh*t), or a mark; white space stands before both.
_WORD = re.compile(r"\s*(?:\w+(?:['’*@$-]\w+)*|[^\w\s])|\s+")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A token that could have come next."""

    text: str
    p: float
    q: float

    @property
    def ratio(self) -> float:
        """q / p: how much more often the target says it than the model."""
        return self.q / self.p


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of the text."""

    text: str
    evidence: float
    """In logits, base e: below 0 it speaks against the constraint."""
    satisfaction: float
    """R after it."""
    said: Choice
    """The token itself among those that could have come."""
    of_model: tuple[Choice, ...]
    """The likeliest of p."""
    of_target: tuple[Choice, ...]
    """The likeliest of q."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """Neighbouring tokens that people read as one word."""

    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        """With the white space before it."""
        return "".join(token.text for token in self.tokens)

    @property
    def evidence(self) -> float:
        """The sum of its tokens', in logits."""
        return sum(token.evidence for token in self.tokens)

    @property
    def satisfaction(self) -> float:
        """R after it."""
        return self.tokens[-1].satisfaction


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What one run's auxiliary makes of one text."""

    prompt: str
    satisfaction: float
    """R before the first token."""
    words: tuple[Word, ...]
    score: float | None
    """What the run's scorer says of the whole text; None where it says nothing."""

    @property
    def strongest(self) -> Word | None:
        """The word that speaks most against the constraint; None where none does."""
        word = min(self.words, key=lambda one: one.evidence)
        return word if word.evidence < 0 else None


@dataclass(frozen=True, kw_only=True)
class ExplainedRun:
    """All texts through one run."""

    name: str
    auxiliary: str
    """Its kind."""
    constraint: str
    """What the scorer is, for people."""
    meaning: str
    """What R is the expectation of."""
    texts: tuple[Explanation, ...]


def explain_command(
    targets: Sequence[str],
    *,
    texts: Sequence[str],
    prompt: str,
    alternatives: int,
    display: Display,
) -> list[ExplainedRun]:
    """Explain texts by one run or several.

    Args:
        targets: run folders.
        texts: what is looked at; each continues the prompt exactly as written.
        prompt: what they follow; where it is empty a text follows the token that begins texts.
        alternatives: tokens shown of p and of q at each position.
        display: what people watch.

    Raises:
        ConfigError: when a target is no finished run.
        DataError: when a text is empty or too long for a model.
        ModelError: when a model is missing.
        CheckpointError: when an auxiliary cannot be read.
        ScorerError: when a scorer cannot be loaded.
    """
    runs = {target: finished_run(target, "cft explain") for target in dict.fromkeys(targets)}
    if not all(text.strip() for text in texts):
        raise DataError("a text is empty; give at least a word after --text")
    if prompt[-1:].isalnum() and any(text[:1].isalnum() for text in texts):
        display.note("the text goes on with the prompt's last word; begin it with a space if not")
    # What is shared should not tell where the run lies, unless it has to.
    short = {target: run.path.absolute().name for target, run in runs.items()}
    count = Counter(short.values())
    names = {target: name if count[name] == 1 else target for target, name in short.items()}
    explained = []
    for target, run in runs.items():
        display.phase(f"explaining by {target}", len(texts))
        scorers = scorers_of(run)
        source = final_model(run)
        llm, limit = source.load(), source.context_length()
        auxiliary = FrozenAuxiliary.load(run.final_auxiliary, llm.device)
        scores = least_scores(scorers, [prompt] * len(texts), texts)
        found = []
        for text, score in zip(texts, scores, strict=True):
            prompt_ids, ids = _tokens(llm.tokenizer, prompt, text, limit)
            start, tokens = explain_tokens(llm, auxiliary, prompt_ids, ids, alternatives)
            found.append(
                Explanation(prompt=prompt, satisfaction=start, words=words_of(tokens), score=score)
            )
            display.advance()
        explained.append(
            ExplainedRun(
                name=names[target],
                auxiliary=auxiliary.kind,
                constraint=" and ".join(scorer.name for scorer in scorers),
                meaning=meaning(run.config()),
                texts=tuple(found),
            )
        )
    return explained


def explain_tokens(
    llm: FrozenLLM,
    auxiliary: FrozenAuxiliary,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    alternatives: int,
) -> tuple[float, list[Token]]:
    """(R before the first token, the tokens).

    Evidence is a difference of logits of R. The additive auxiliary adds up exactly such terms, so
    there it is the token's own term, factors · tokens[v] + prior[v], also where R itself is cut at
    its limit; R(x), before the first token, is its prompt bias. The other kinds, and the product of
    several R, have no R of an empty completion: R(x) is Rbar(x), the expectation of R over the
    first token, and the evidence is the difference of logit R after the token and before it.

    Args:
        llm: p, to which the auxiliary was fitted.
        auxiliary: R.
        prompt_ids: at least one token.
        ids: the text, at least one token.
        alternatives: how many of the likeliest tokens of p and of q are listed.
    """
    ids_T = torch.tensor(ids, device=llm.device)
    hidden_TD = _hidden_states(llm, prompt_ids, ids)
    mask_T = torch.ones_like(ids_T, dtype=torch.bool)
    read = auxiliary.read_examples(hidden_TD[None], ids_T[None], mask_T[None])
    table = auxiliary.table
    logits_T = table.logits_of(read.factors_NTJR, read.offset_NTJ, ids_T[None])[0]
    usable = len(llm.tokenizer)  # a head may be padded beyond the tokenizer
    choices: list[tuple[Choice, tuple[Choice, ...], tuple[Choice, ...]]] = []
    root = read.offset_NTJ[0, 0, 0]
    for first in range(0, len(ids), _CHUNK):
        part = slice(first, first + _CHUNK)
        p_TV = llm.head(hidden_TD[part])[:, :usable]
        u_TV = table.logits(read.factors_NTJR[0, part], read.offset_NTJ[0, part])[:, :usable]
        if first == 0 and not auxiliary.adds_up:
            root = equations.log_odds(*equations.expected_satisfaction_logprobs(p_TV[0], u_TV[0]))
        choices += _choices(llm.tokenizer, p_TV, u_TV, ids_T[part], alternatives)
    if auxiliary.adds_up:
        evidence_T = table.evidence(read.factors_NTJR, ids_T[None])[0, :, 0]
    else:
        evidence_T = logits_T - torch.cat([root[None], logits_T[:-1]])
    rows = zip(
        pieces(llm.tokenizer, ids),
        evidence_T.tolist(),
        logits_T.sigmoid().tolist(),
        choices,
        strict=True,
    )
    return float(root.sigmoid()), [
        Token(
            text=text,
            evidence=evidence,
            satisfaction=satisfaction,
            said=said,
            of_model=of_model,
            of_target=of_target,
        )
        for text, evidence, satisfaction, (said, of_model, of_target) in rows
    ]


def words_of(tokens: Sequence[Token]) -> tuple[Word, ...]:
    """Tokens put together to words; none is cut, and all of the text is kept."""
    text = "".join(token.text for token in tokens)
    starts = {found.start() for found in _WORD.finditer(text)}
    groups: list[list[Token]] = []
    place = 0
    for token in tokens:
        # A token of several words belongs to the first that it begins.
        begins = any(place + i in starts for i in range(len(token.text)))
        if begins or not groups:
            groups.append([])
        groups[-1].append(token)
        place += len(token.text)
    return tuple(Word(tokens=tuple(group)) for group in groups)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text.

    Of tokens that only together are a character, the first has it and the others nothing.
    """
    found = [""] * len(ids)
    done, first = "", 0
    for end in range(1, len(ids) + 1):
        text = _text(tokenizer, ids[:end])
        if end < len(ids) and text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        found[first] = text[len(done) :]
        done, first = text, end
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, limit: int | None
) -> tuple[list[int], list[int]]:
    """The tokens of prompt and text, apart as in training."""
    encoder = Encoder(tokenizer)
    before, ids = encoder.encode([prompt, text])
    prompt_ids = [*encoder.prefix, *before]
    if not prompt_ids:
        begin = tokenizer.bos_token_id
        prompt_ids = [tokenizer.eos_token_id if begin is None else begin]
    if limit is not None and len(prompt_ids) + len(ids) > limit:
        raise DataError(
            f"prompt and text have {len(prompt_ids) + len(ids):,} tokens, but the model's context "
            f"is {limit:,}: give a shorter text"
        )
    return prompt_ids, ids


def _hidden_states(
    llm: FrozenLLM, prompt_ids: Sequence[int], ids: Sequence[int]
) -> Float[Tensor, "T D"]:
    """The states that predict each token of the text."""
    ids_BL = torch.tensor([[*prompt_ids, *ids]], device=llm.device)
    lengths_B = torch.tensor([ids_BL.shape[1]], device=llm.device)
    return llm.hidden_states(ids_BL, lengths_B)[0, len(prompt_ids) - 1 : -1]


def _choices(
    tokenizer: PreTrainedTokenizerBase,
    p_TV: Float[Tensor, "T V"],
    u_TV: Float[Tensor, "T V"],
    ids_T: Int[Tensor, " T"],
    alternatives: int,
) -> list[tuple[Choice, tuple[Choice, ...], tuple[Choice, ...]]]:
    """At each position: the token that was said, the likeliest of p, the likeliest of q."""
    logp_TV = torch.log_softmax(p_TV, -1)
    logq_TV = equations.target_logprobs(p_TV, u_TV)
    count = min(alternatives, p_TV.shape[1])
    wanted_TK = torch.cat(
        [ids_T[:, None], logp_TV.topk(count).indices, logq_TV.topk(count).indices], 1
    )
    p_TK, q_TK = (log_TV.gather(1, wanted_TK).double().exp() for log_TV in (logp_TV, logq_TV))
    found = []
    for row in zip(wanted_TK.tolist(), p_TK.tolist(), q_TK.tolist(), strict=True):
        said, *rest = (
            Choice(text=_text(tokenizer, [token]), p=p, q=q)
            for token, p, q in zip(*row, strict=True)
        )
        found.append((said, tuple(rest[:count]), tuple(rest[count:])))
    return found


def summary(explanation: Explanation) -> str:
    """The outcome of one text, in a sentence or two."""
    against = explanation.strongest
    if against is None:
        said = "No word speaks against the constraint."
    else:
        said = (
            f"Most against the constraint: “{against.text.strip()}” "
            f"({against.evidence:+.2f}: the odds become {odds(against.evidence)})."
        )
    score = "gives no score" if explanation.score is None else f"says {explanation.score:.2f}"
    return (
        f"R goes from {explanation.satisfaction:.2f} before the text to "
        f"{explanation.words[-1].satisfaction:.2f} after it. {said} The scorer {score}."
    )


def odds(evidence: float) -> str:
    """What evidence does to odds, in words."""
    factor = math.exp(abs(evidence))
    size = "over 1,000" if factor > 1000 else f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"
    return f"{size} times {'smaller' if evidence < 0 else 'larger'}"


def legends(runs: Sequence[ExplainedRun]) -> list[str]:
    """How to read the picture, for people who know nothing of the method."""
    return list(dict.fromkeys(line for run in runs for line in _legend(run)))


def _legend(run: ExplainedRun) -> tuple[str, ...]:
    return (
        "Red words speak against the constraint, green ones for it. The number is the evidence of "
        "the word: what it does to the odds that all ends well. -0.7 halves them, -2.3 divides "
        "them by ten, +0.7 doubles them.",
        f"R, from 0 to 1, is the auxiliary's estimate of {run.meaning}.",
        "Before each token, p is what the model would say next, and q what the target would, "
        "towards which the model is trained: p times R of the text with that token, made to sum "
        "to 1. ×0.2 is a token that the target says a fifth as often as the model.",
        "R has learned from scored samples and can be wrong; the scorer has the last word.",
    )


def meaning(config: Config) -> str:
    """What R is the expectation of."""
    labels = {term.labels for term in config.constraint.all_terms().values()}
    match labels:
        case _ if labels == {"hard"}:
            return "the chance that a text which begins like this ends satisfying the constraint"
        case _ if labels == {"soft"}:
            return "the score that a text which begins like this is expected to get"
        case _:
            return (
                "how well a text which begins like this is expected to do, on a scale that falls "
                "off steeply below a perfect score"
            )
