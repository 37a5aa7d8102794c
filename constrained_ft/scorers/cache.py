"""Scores that were paid for, on disk: the same text is never asked about twice.

SQLite in WAL mode. A row is committed before its score is used and reaches the system at once, so a
process that is killed loses none. Failures are not kept: they are asked again.

Where: a scorer whose version names exactly what it does (a classifier by its weights, a service by
its version) shares one file among all runs, in the user's cache. A function's version covers its
own file and not what it imports, so its scores stay in the run's folder, a file for each process;
each process reads those of all. Quick local scorers are asked again: that is faster than looking.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from constrained_ft.errors import ScorerError
from constrained_ft.resources import cache_dir
from constrained_ft.scorer_config import ScorerConfig, is_slow, kinds_of
from constrained_ft.scorers.combined import Columns, cancel, give_columns, needs_columns
from constrained_ft.scorers.protocol import Score, ScoreFailure, Scorer, valid

_TABLE = """CREATE TABLE IF NOT EXISTS scores (
    key BLOB PRIMARY KEY, scorer TEXT NOT NULL, score REAL NOT NULL) WITHOUT ROWID"""
_WAIT_SECONDS = 60.0
_CHUNK = 500  # keys in one question


class ScoreCache:
    """One SQLite file that is written, and others that are only read."""

    def __init__(self, file: Path, others: Sequence[Path] = ()) -> None:
        """Open the files.

        Raises:
            ScorerError: if one cannot be opened.
        """
        self._file = file
        self._lock = threading.Lock()
        with self._told():
            file.parent.mkdir(parents=True, exist_ok=True)
            own = sqlite3.connect(file, timeout=_WAIT_SECONDS, check_same_thread=False)
            own.execute("PRAGMA journal_mode=WAL")
            own.execute("PRAGMA synchronous=NORMAL")
            own.execute(_TABLE)
            own.commit()
            self._open = [own]
            self._open += [read for other in others if (read := _readable(other)) is not None]

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The scores that are known.

        Raises:
            ScorerError: if they cannot be read.
        """
        found: dict[bytes, float] = {}
        with self._lock, self._told():
            for connection in self._open:
                for start in range(0, len(keys), _CHUNK):
                    some = keys[start : start + _CHUNK]
                    marks = ",".join("?" * len(some))
                    question = f"SELECT key, score FROM scores WHERE key IN ({marks})"
                    found |= dict(connection.execute(question, list(some)))
        return found

    def add(self, scorer: str, scores: dict[bytes, float]) -> None:
        """Keep scores.

        Raises:
            ScorerError: if they cannot be written.
        """
        with self._lock, self._told(), self._open[0] as own:
            rows = [(key, scorer, score) for key, score in scores.items()]
            own.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def counts(self) -> dict[str, int]:
        """Scores by scorer.

        Raises:
            ScorerError: if they cannot be read.
        """
        with self._lock, self._told():
            question = "SELECT scorer, COUNT(*) FROM scores GROUP BY scorer ORDER BY scorer"
            return dict(self._open[0].execute(question))

    def clear(self) -> None:
        """Forget all.

        Raises:
            ScorerError: if the file cannot be written.
        """
        with self._lock, self._told():
            with self._open[0] as own:
                own.execute("DELETE FROM scores")
            self._open[0].execute("VACUUM")

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for connection in self._open:
                connection.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise ScorerError(
                f"cannot use the kept scores in {self._file}: {error}; free space, make the folder "
                "writable, or delete the file"
            ) from error


def _readable(file: Path) -> sqlite3.Connection | None:
    """A file of another process, unless that has only just begun it."""
    uri = f"{file.resolve().as_uri()}?mode=ro"
    read = sqlite3.connect(uri, uri=True, timeout=_WAIT_SECONDS, check_same_thread=False)
    if read.execute("SELECT 1 FROM sqlite_master WHERE name = 'scores'").fetchone() is None:
        read.close()
        return None
    return read


class RememberingScorer:
    """A scorer that is asked once for each text."""

    def __init__(self, scorer: Scorer, cache: ScoreCache) -> None:
        self._scorer = scorer
        self._cache = cache
        self.name = scorer.name
        self.version = scorer.version
        self.asked = 0
        """Completions so far."""
        self.known = 0
        """Those of them whose score was kept already."""

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """What is known, and what the scorer says of the rest."""
        keys = [self._key(*pair) for pair in zip(prompts, completions, strict=True)]
        known = self._cache.get(list(dict.fromkeys(keys)))
        results: dict[bytes, Score | ScoreFailure] = {k: Score(v) for k, v in known.items()}
        # The same text may stand there twice.
        asked = {keys[i]: i for i in reversed(range(len(keys))) if keys[i] not in results}
        places = sorted(asked.values())
        self.asked += len(keys)
        self.known += len(keys) - len(places)
        if places:
            found = valid(
                self._scorer, [prompts[i] for i in places], [completions[i] for i in places]
            )
            fresh = dict(zip((keys[i] for i in places), found, strict=True))
            worth = {key: one.value for key, one in fresh.items() if isinstance(one, Score)}
            if worth:
                self._cache.add(f"{self.name} {self.version}", worth)
            results |= fresh
        return [results[key] for key in keys]

    def cancel(self) -> None:
        """Return soon."""
        cancel(self._scorer)

    @property
    def needs_columns(self) -> bool:
        """Whether the scorer does."""
        return needs_columns(self._scorer)

    def take_columns(self, columns: Columns) -> None:
        """What is kept stays in the run's folder, and there a prompt has one row."""
        give_columns(self._scorer, columns)

    def _key(self, prompt: str, completion: str) -> bytes:
        parts = json.dumps([self.name, self.version, prompt, completion])
        return hashlib.sha256(parts.encode()).digest()[:16]


def user_cache() -> Path:
    """The file that all runs share."""
    return cache_dir() / "scores.sqlite"


def remembering(scorer: Scorer, config: ScorerConfig, folder: Path | None, rank: int) -> Scorer:
    """The scorer with a memory where that pays.

    Args:
        scorer: as built from `config`.
        config: its section.
        folder: the run's `scores/`; None has no place for those of functions.
        rank: whose file there is written to.

    Raises:
        ScorerError: if a file cannot be opened.
    """
    if "function" in kinds_of(config):
        if folder is None:
            return scorer
        own = folder / f"rank_{rank}.sqlite"
        others = [file for file in sorted(folder.glob("rank_*.sqlite")) if file != own]
        return RememberingScorer(scorer, ScoreCache(own, others))
    return RememberingScorer(scorer, ScoreCache(user_cache())) if is_slow(config) else scorer
