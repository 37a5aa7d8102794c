"""The corpus: its rows split by a hash, counted, and served in batches by the step's number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from constrained_ft.config import DataConfig
from constrained_ft.encoding import Document, Encoder, Row
from constrained_ft.errors import DataError
from constrained_ft.order import held_out_by_hash, permutation
from constrained_ft.records import grouped_records


@dataclass(frozen=True, kw_only=True)
class CorpusStats:
    """What was read, counted before any source is repeated."""

    rows: int
    """Training rows."""
    tokens: int
    """Tokens of the training rows."""
    trained_tokens: int
    """Those of them that are training targets."""
    longest: int
    """Tokens of the longest document as it was read, training or validation."""
    truncated_rows: int
    """Prompt + completion and chat rows that were cut, training or validation."""
    split_documents: int
    """Plain texts that became several rows, training or validation."""
    validation_rows: int
    """Rows held out."""
    by_group: Mapping[str, "CorpusStats"] = field(default_factory=dict)
    """The same for each group; empty inside a group."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tokenised corpus."""

    training: tuple[Row, ...]
    """One pass; a row of a repeated source stands here several times."""
    validation: tuple[Row, ...]
    stats: CorpusStats

    def batch(self, step: int, size: int, seed: int) -> tuple[Row, ...]:
        """The rows of a step (counted from 0): every row once before any comes up again."""
        total = len(self.training)
        places = (divmod(position, total) for position in range(step * size, (step + 1) * size))
        return tuple(
            self.training[permutation(total, seed, "corpus", epoch)[offset]]
            for epoch, offset in places
        )

    def without(self, dropped: Sequence[bool]) -> "Corpus":
        """The corpus without some training rows.

        Raises:
            DataError: if none is left.
        """
        kept = tuple(r for r, drop in zip(self.training, dropped, strict=True) if not drop)
        if not kept:
            raise DataError(
                "trainer.filter_corpus=true leaves no row: every row of the corpus violates the "
                "constraint; lower constraint.satisfied_at or use another corpus"
            )
        return replace(self, training=kept)


def load_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read, split, tokenise and mask the corpus.

    Raises:
        ConfigError: if a wheel reference does not have the form.
        DataError: if a source is missing, empty or malformed.
        ModelError: if the tokenizer has no end-of-text token.
    """
    encoder = Encoder(tokenizer)
    training: list[Row] = []
    validation: list[Row] = []
    by_group: dict[str, CorpusStats] = {}
    for (group, repeat), records in grouped_records(config).items():
        documents = encoder.documents(records, config.max_length)
        held_out = held_out_by_hash([record.key for record in records], config.validation_share)
        sides: dict[bool, list[Row]] = {False: [], True: []}
        for document, is_held_out in zip(documents, held_out, strict=True):
            sides[is_held_out] += document.rows
        training += sides[False] * repeat
        validation += sides[True]
        stats = _stats(documents, sides[False], sides[True])
        by_group[group] = _sum_stats([stats, *([by_group[group]] if group in by_group else [])])
    total = _sum_stats(list(by_group.values()), by_group)
    if not training:
        raise DataError(
            f"data: no row is left for training with validation_share={config.validation_share}; "
            "give more rows, or lower data.validation_share"
        )
    return Corpus(training=tuple(training), validation=tuple(validation), stats=total)


def corpus_of(rows: Sequence[Row]) -> Corpus:
    """A corpus of rows that are tokenised already, all of them for training."""
    stats = CorpusStats(
        rows=len(rows),
        tokens=sum(len(row.token_ids) for row in rows),
        trained_tokens=sum(sum(row.trained) for row in rows),
        longest=max((len(row.token_ids) for row in rows), default=0),
        truncated_rows=0,
        split_documents=0,
        validation_rows=0,
    )
    return Corpus(training=tuple(rows), validation=(), stats=stats)


def prompt_and_text(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a scorer is asked about a row: its trained part, after the rest as the prompt.

    A row with a label is all prompt: nothing of it is learned to be said.
    """
    first = len(row.token_ids) if row.label is not None else 0
    if row.prompted and any(row.trained):
        first = row.trained.index(True)
    sides = [row.token_ids[:first], row.token_ids[first:]]
    prompt, text = tokenizer.batch_decode([list(side) for side in sides], skip_special_tokens=True)
    return prompt, text


def _stats(
    documents: Sequence[Document], training: Sequence[Row], validation: Sequence[Row]
) -> CorpusStats:
    return CorpusStats(
        rows=len(training),
        tokens=sum(len(row.token_ids) for row in training),
        trained_tokens=sum(sum(row.trained) for row in training),
        longest=max(document.length for document in documents),
        truncated_rows=sum(document.truncated for document in documents),
        split_documents=sum(len(document.rows) > 1 for document in documents),
        validation_rows=len(validation),
    )


def _sum_stats(
    parts: Sequence[CorpusStats], by_group: Mapping[str, CorpusStats] | None = None
) -> CorpusStats:
    return CorpusStats(
        rows=sum(part.rows for part in parts),
        tokens=sum(part.tokens for part in parts),
        trained_tokens=sum(part.trained_tokens for part in parts),
        longest=max(part.longest for part in parts),
        truncated_rows=sum(part.truncated_rows for part in parts),
        split_documents=sum(part.split_documents for part in parts),
        validation_rows=sum(part.validation_rows for part in parts),
        by_group=by_group or {},
    )
