"""Prompts: read or cut out of the corpus, split by a hash, tokenised, and drawn by iteration."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from constrained_ft.config import DataConfig, PromptsConfig, SourceConfig
from constrained_ft.encoding import Encoder, render_chat
from constrained_ft.errors import ConfigError, DataError
from constrained_ft.order import held_out_by_hash, permutation
from constrained_ft.records import (
    Chat,
    Completion,
    Draft,
    Labelled,
    Record,
    Text,
    file_prompts,
    grouped_records,
    opening,
)
from constrained_ft.sources import sources_of


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt x."""

    id: str
    """A hash of the text."""
    text: str
    group: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a run; no text is on both sides."""

    training: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What else the row of a prompt says, by its text, for scorer functions."""

    def of_iteration(self, iteration: int, count: int, seed: int) -> tuple[Prompt, ...]:
        """The prompts that are sampled in an iteration (counted from 1), `count` different ones.

        Every prompt comes up once before any comes up again.
        """
        assert iteration >= 1
        assert 1 <= count <= len(self.training)
        first = (iteration - 1) * count
        epoch, start = divmod(first, len(self.training))
        order, tail = _epoch_order(len(self.training), count, seed, epoch)
        chosen = order[start : start + count]
        if len(chosen) < count:
            # This iteration takes the rest of one pass and begins the next, which puts these last.
            order, _ = _epoch_order(len(self.training), count, seed, epoch + 1)
            assert chosen == tail
            chosen += order[: count - len(chosen)]
        return tuple(self.training[i] for i in chosen)


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    context_length: int | None,
) -> Prompts:
    """Read, deduplicate, split and tokenise the prompts; `data` is used with `from_corpus`.

    Raises:
        ConfigError: if an iteration asks for more prompts than there are.
        DataError: if a source is missing, empty or malformed, or a prompt is too long.
    """
    if config.from_corpus:
        drafts = _corpus_prompts(data, config.opening_words, tokenizer)
    else:
        drafts = [
            draft
            for name, source in sources_of(config, "prompts").items()
            for draft in file_prompts(name, source)
        ]
    prompts = _prompts(drafts, tokenizer)
    check_prompt_lengths(prompts, config.max_new_tokens, context_length)
    training: list[Prompt] = []
    held_out: list[Prompt] = []
    for group in dict.fromkeys(prompt.group for prompt in prompts):
        mine = [prompt for prompt in prompts if prompt.group == group]
        for prompt, held in zip(
            mine, held_out_by_hash([p.text for p in mine], config.held_out_share), strict=True
        ):
            (held_out if held else training).append(prompt)
    if not held_out or not training:
        raise DataError(
            f"prompts: {len(prompts)} different prompts cannot be split into training and held-out "
            "ones; give more prompts"
        )
    if len(training) < config.prompts_per_iteration:
        raise ConfigError(
            f"prompts.prompts_per_iteration={config.prompts_per_iteration}, but there are only "
            f"{len(training)} training prompts ({len(held_out)} are held out): lower it, or give "
            "more prompts"
        )
    return Prompts(training=tuple(training), held_out=tuple(held_out), columns=_columns(drafts))


def read_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    group: str = "file",
    columns: Sequence[str] = (),
) -> Prompts:
    """The different prompts of a file: one a line, or rows with a `prompt` (or `text`).

    None of them is for training.

    Raises:
        DataError: if the file is missing, empty or malformed.
    """
    source = SourceConfig(path=path, text_column="prompt", columns=tuple(columns))
    drafts = file_prompts(group, source)
    prompts = tuple(_prompts(drafts, tokenizer))
    return Prompts(training=(), held_out=prompts, columns=_columns(drafts))


def tokenise_prompts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, group: str = "given"
) -> tuple[Prompt, ...]:
    """The different ones of some texts as prompts.

    Raises:
        DataError: if a text is empty.
    """
    drafts = [Draft(text=text, group=group, rendered=False) for text in texts]
    if not all(draft.text.strip() for draft in drafts):
        raise DataError("a prompt is empty; give at least a word")
    return tuple(_prompts(drafts, tokenizer))


def check_prompt_lengths(
    prompts: Iterable[Prompt], max_new_tokens: int, context_length: int | None
) -> None:
    """See that each prompt and its completion fit into the model; None is a model without a limit.

    Raises:
        DataError: naming the first prompt that does not.
    """
    if context_length is None:
        return
    for prompt in prompts:
        needed = len(prompt.token_ids) + max_new_tokens
        if needed > context_length:
            raise DataError(
                f"the prompt {_excerpt(prompt.text)} ({prompt.group}) has {len(prompt.token_ids)} "
                f"tokens; with max_new_tokens={max_new_tokens} it needs {needed}, but the model's "
                f"context is {context_length}: shorten it, or lower max_new_tokens"
            )


def _corpus_prompts(
    data: DataConfig, words: int, tokenizer: PreTrainedTokenizerBase
) -> list[Draft]:
    """Prompts from the training part of the corpus."""
    drafts = []
    for (group, _), records in grouped_records(data).items():
        held_out = held_out_by_hash([record.key for record in records], data.validation_share)
        for record, held in zip(records, held_out, strict=True):
            if held:
                continue
            text = _prompt_of(record, words, tokenizer)
            rendered = isinstance(record.content, Chat)
            if text.strip():
                drafts.append(Draft(text=text, group=group, rendered=rendered))
    return drafts


def _prompt_of(record: Record, words: int, tokenizer: PreTrainedTokenizerBase) -> str:
    content = record.content
    match content:
        case Text():
            return opening(content.text, words)
        case Completion():
            return content.prompt
        case Labelled():
            return content.question
        case Chat():
            turns = [i for i, m in enumerate(content.messages) if m["role"] == "assistant"]
            before = content.messages[: turns[-1]] if turns else content.messages
            return render_chat(tokenizer, before, record.origin, add_generation_prompt=True)


def _prompts(drafts: Sequence[Draft], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Tokenised prompts without duplicates: the first of equal ones stays."""
    first: dict[str, Draft] = {}
    for draft in drafts:
        first.setdefault(draft.text, draft)
    distinct = list(first.values())
    if not distinct:
        raise DataError("there are no prompts")
    encoder = Encoder(tokenizer)
    all_ids = encoder.encode([draft.text for draft in distinct])
    return [
        Prompt(
            id=hashlib.sha256(draft.text.encode()).hexdigest()[:16],
            text=draft.text,
            group=draft.group,
            token_ids=(() if draft.rendered else encoder.prefix) + tuple(ids),
        )
        for draft, ids in zip(distinct, all_ids, strict=True)
    ]


def _columns(drafts: Sequence[Draft]) -> dict[str, Mapping[str, Any]]:
    """By the prompt; of equal ones the first counts."""
    return {draft.text: draft.columns for draft in reversed(drafts) if draft.columns}


def _epoch_order(total: int, count: int, seed: int, epoch: int) -> tuple[list[int], list[int]]:
    """The order of a pass over the prompts, and its rest: what no full iteration is left for.

    An iteration takes the rest together with the beginning of the next pass. It would repeat a
    prompt if that began with one of the rest, so those are put behind the prompts that it needs;
    each pass therefore depends on the one before.
    """
    order: list[int] = []
    tail: list[int] = []
    for current in range(epoch + 1):
        order = list(permutation(total, seed, "prompts", current))
        if tail:
            missing = count - len(tail)
            rest = set(tail)
            head = [i for i in order if i not in rest][:missing]
            taken = set(head)
            order = head + [i for i in order if i not in taken]
        used = (total * (current + 1)) % count
        tail = order[total - used :] if used else []
    return order, tail


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
