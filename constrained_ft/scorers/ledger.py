"""Scores that were paid for, on disk: a run that is stopped and continued never asks twice.

Each process appends to a file of its own, one JSON row a score, and reads those of all at the
start. A row is written before its score is used, and reaches the system at once, so a process that
is killed loses none; a last row that was cut is passed over.
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from constrained_ft.errors import ScorerError
from constrained_ft.scorers.protocol import Score, ScoreFailure, Scorer, wrong_count


class Ledger:
    """Scores by what they are of: the scorer's name and version, the prompt, the completion."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Read what is there.

        Args:
            folder: the run's `scores/`; made with the first score.
            rank: whose file is written to.

        Raises:
            ScorerError: if a file cannot be read.
        """
        self._file = folder / f"rank_{rank}.jsonl"
        self._scores: dict[bytes, float] = {}
        self._lock = threading.Lock()
        for file in sorted(folder.glob("rank_*.jsonl")):
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ScorerError(f"cannot read the scores in {file}: {error}") from error
            for line in lines:
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            key, score = bytes.fromhex(row["key"]), float(row["score"])
        except (ValueError, KeyError, TypeError):
            return  # cut when a process was killed
        if math.isfinite(score) and 0 <= score <= 1:
            self._scores[key] = score

    def get(self, key: bytes) -> float | None:
        """The score, if it is known."""
        return self._scores.get(key)

    def add(self, scores: dict[bytes, float]) -> None:
        """Keep scores.

        Raises:
            ScorerError: if they cannot be written.
        """
        rows = "".join(
            json.dumps({"key": key.hex(), "score": score}) + "\n" for key, score in scores.items()
        )
        with self._lock:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                descriptor = os.open(self._file, flags, 0o644)
                try:
                    # A row cut by an earlier kill must not swallow the next one.
                    os.write(descriptor, f"\n{rows}".encode())
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise ScorerError(f"cannot write scores to {self._file}: {error}") from error
            self._scores |= scores


class RememberingScorer:
    """A scorer that is asked once for each text."""

    def __init__(self, scorer: Scorer, ledger: Ledger) -> None:
        self._scorer = scorer
        self._ledger = ledger
        self.name = scorer.name
        self.version = scorer.version

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """What is known, and what the scorer says of the rest."""
        keys = [self._key(*pair) for pair in zip(prompts, completions, strict=True)]
        results: list[Score | ScoreFailure | None] = []
        for key in keys:
            known = self._ledger.get(key)
            results.append(None if known is None else Score(known))
        # The same text may stand there twice.
        asked = {keys[i]: i for i, known in reversed([*enumerate(results)]) if known is None}
        places = sorted(asked.values())
        if places:
            some = [prompts[i] for i in places], [completions[i] for i in places]
            found = self._scorer.score(*some)
            if len(found) != len(places):
                raise ScorerError(wrong_count(self.name, len(found), len(places)))
            by_key = {keys[i]: result for i, result in zip(places, found, strict=True)}
            self._ledger.add(
                {
                    key: result.value
                    for key, result in by_key.items()
                    if isinstance(result, Score) and 0 <= result.value <= 1
                }
            )
            results = [by_key.get(key, known) for key, known in zip(keys, results, strict=True)]
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def _key(self, prompt: str, completion: str) -> bytes:
        parts = json.dumps([self.name, self.version, prompt, completion])
        return hashlib.sha256(parts.encode()).digest()[:16]
