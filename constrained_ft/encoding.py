"""Records become tokens and masks: which tokens are trained follows from where they stand.

It never follows from their id: padding may share its id with the end of a text, and the end is
still trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from constrained_ft.errors import ConfigError, DataError, ModelError
from constrained_ft.records import Chat, Completion, Labelled, Record, Text
from constrained_ft.resources import one_line


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sequence of the corpus."""

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    """Whether the token at a position is a training target; the first one never is."""
    group: str
    prompted: bool
    """Whether the row has a prompt of its own."""
    label: bool | None = None
    """What a classification head is to say after the last token; None: it is not asked."""
    weight: float = 1.0
    """What each target counts for in the cross-entropy."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.trained)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained; a label counts as one."""
        return sum(self.trained) + (self.label is not None)


@dataclass(frozen=True, kw_only=True)
class Document:
    """What became of one record."""

    rows: tuple[Row, ...]
    length: int
    """Tokens before it was split or cut."""
    truncated: bool
    """Whether tokens were cut off."""


class Encoder:
    """Turns rows into tokens and masks, the way the model will see them when it is sampled.

    When sampling, the model is given the tokens of the prompt alone, so no token may straddle the
    border between a prompt and its completion.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        bare = self.encode(["a"])[0]
        full = list(tokenizer("a")["input_ids"])
        begin = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.prefix: tuple[int, ...] = tuple(full[:begin])
        """What the tokenizer puts before every text (BOS), if anything."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without any special tokens added."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def pairs(
        self, prompts: Sequence[str], completion: str
    ) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Token ids of each prompt, and of what the completion adds to them, as it is trained."""
        pieces = self._pieces([[(prompt, False), (completion, True)] for prompt in prompts])
        return [((*self.prefix, *prompt), tuple(said)) for prompt, said in pieces]

    def documents(self, records: Sequence[Record], max_length: int) -> list[Document]:
        """The rows of each record: several where a plain text is longer than `max_length`."""
        eos = self._tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ModelError(
                "the tokenizer has no end-of-text token, so the model could not learn to stop: set "
                "`eos_token` in its tokenizer_config.json"
            )
        segments = [self._segments(record) for record in records]
        documents = []
        for record, parts, pieces in zip(records, segments, self._pieces(segments), strict=True):
            tokens = [token for piece in pieces for token in piece]
            trained = [
                is_trained
                for piece, (_, is_trained) in zip(pieces, parts, strict=True)
                for _ in piece
            ]
            # The end is trained by its place; a chat that ends with a question has no end.
            if parts[-1][1] and tokens[-1:] != [eos]:
                tokens.append(eos)
                trained.append(True)
            documents.append(self._cut(record, tokens, trained, max_length))
        return documents

    def _pieces(self, segments: Sequence[list[tuple[str, bool]]]) -> list[list[list[int]]]:
        """The tokens of each segment of each record.

        A segment's tokens are what it adds to the tokens of all text before it; where a token would
        straddle the border, the segment is tokenised by itself.
        """
        texts = [
            ["".join(text for text, _ in parts[: i + 1]) for i in range(len(parts))]
            for parts in segments
        ]
        ids = iter(self.encode([text for of_record in texts for text in of_record]))
        pieces = []
        for parts in segments:
            before: list[int] = []
            of_record = []
            for text, _ in parts:
                upto = next(ids)
                if upto[: len(before)] == before:
                    of_record.append(upto[len(before) :])
                else:
                    of_record.append(self.encode([text])[0])
                before = upto
            pieces.append(of_record)
        return pieces

    def _segments(self, record: Record) -> list[tuple[str, bool]]:
        """Consecutive pieces of text, and whether each is trained."""
        match record.content:
            case Text(text=text):
                return [(text, True)]
            case Completion(prompt=prompt, completion=completion):
                return [(prompt, False), (completion, True)]
            case Labelled(question=question):
                return [(question, False)]
            case Chat(messages=messages):
                return self._chat_segments(messages, record.origin)

    def _chat_segments(
        self, messages: tuple[dict[str, Any], ...], origin: str
    ) -> list[tuple[str, bool]]:
        """What the assistant says is what rendering its turn adds to rendering all before it."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{origin}: no message has the role `assistant`, so nothing is trained")
        full = render_chat(self._tokenizer, messages, origin, add_generation_prompt=False)
        segments: list[tuple[str, bool]] = []
        done = 0
        for turn in turns:
            before = render_chat(
                self._tokenizer, messages[:turn], origin, add_generation_prompt=True
            )
            after = render_chat(
                self._tokenizer, messages[: turn + 1], origin, add_generation_prompt=False
            )
            if not (full.startswith(after) and after.startswith(before) and len(before) >= done):
                raise DataError(
                    f"{origin}: the chat template rewrites earlier turns, so what the assistant "
                    "said cannot be told apart; give one assistant turn a row, as the last message"
                )
            said = after[len(before) :]
            # Nothing follows the end of a turn when sampling: white space behind it is layout.
            end = str(self._tokenizer.eos_token)
            kept = said.rstrip() if said.rstrip().endswith(end) else said
            segments += [(full[done : len(before)], False), (kept, True)]
            done = len(before) + len(kept)
        rest = full[done:]
        if turns[-1] == len(messages) - 1 and not rest.strip():
            return segments
        return [*segments, (rest, False)]

    def _cut(
        self, record: Record, tokens: list[int], trained: list[bool], max_length: int
    ) -> Document:
        is_text = isinstance(record.content, Text)
        label = record.content.positive if isinstance(record.content, Labelled) else None
        prefix = () if isinstance(record.content, Chat) else self.prefix
        room = max_length - len(prefix)
        if room < 2:
            raise ConfigError(f"data.max_length={max_length} is too short for this tokenizer")
        if is_text:
            # Nearly equal pieces: a last piece of one token would have nothing to predict it from.
            pieces = -(-len(tokens) // room)
            borders = [len(tokens) * i // pieces for i in range(pieces + 1)]
        else:
            borders = [0, min(len(tokens), room)]
        rows = tuple(
            Row(
                token_ids=(*prefix, *tokens[start:stop]),
                trained=_mask(len(prefix), trained[start:stop]),
                group=record.group,
                prompted=not is_text,
                label=label,
                weight=record.weight,
            )
            for start, stop in pairwise(borders)
        )
        if label is not None and borders[-1] < len(tokens):
            raise DataError(
                f"{record.origin} has {len(prefix) + len(tokens)} tokens as a question, above "
                f"data.max_length={max_length}: set opening_words of its source"
            )
        self._check_row(record, rows[0], max_length)
        return Document(
            rows=rows, length=len(prefix) + len(tokens), truncated=borders[-1] < len(tokens)
        )

    def _check_row(self, record: Record, row: Row, max_length: int) -> None:
        bos = self._tokenizer.bos_token_id
        if self.prefix and row.token_ids[:2] == (bos, bos):
            raise DataError(
                f"{record.origin} begins with {self._tokenizer.bos_token!r}, which the tokenizer "
                "adds itself: remove it from the text"
            )
        if row.num_targets == 0:
            raise DataError(
                f"{record.origin}: no token is left to train within data.max_length={max_length}: "
                "its prompt is too long, or its text too short; raise data.max_length or remove it"
            )


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    origin: str,
    *,
    add_generation_prompt: bool,
) -> str:
    """A chat as the tokenizer's template writes it."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{origin} has `messages`, but the model's tokenizer has no chat template; use an "
            "instruction-tuned model, or rows with `prompt` and `completion`"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise DataError(f"{origin}: the chat template refuses it: {one_line(error)}") from error
    assert isinstance(text, str)
    return text


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill batches with; what is filling follows from the lengths, so any id will do.

    Raises:
        ModelError: if the tokenizer has neither a padding nor an end-of-text token.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ModelError(
        "the tokenizer has neither a padding nor an end-of-text token: set `eos_token` in its "
        "tokenizer_config.json"
    )


def _mask(num_prefix: int, trained: Sequence[bool]) -> tuple[bool, ...]:
    mask = [False] * num_prefix + list(trained)
    mask[0] = False  # Nothing stands before the first token to predict it from.
    return tuple(mask)
