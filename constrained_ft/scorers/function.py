"""A Python function of the user's: `function(prompts, completions) -> list[float]`."""

import hashlib
import importlib.util
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np

from constrained_ft.errors import ScorerError
from constrained_ft.scorers.protocol import Score, ScoreFailure


class FunctionScorer:
    """Calls a function out of a file; the file is run once, when the scorer is built."""

    def __init__(self, path: str, in_flight: int = 1) -> None:
        self._in_flight = in_flight
        filename, _, function = path.rpartition(":")
        self._file = Path(filename).expanduser().resolve()
        if not self._file.is_file():
            raise ScorerError(f"constraint.scorer.path={path}: there is no file {self._file}")
        source = self._file.read_bytes()
        self.name = f"function {path}"
        self.version = hashlib.sha256(source).hexdigest()[:16]
        module = _module(self._file, self.version)
        found: object = vars(module).get(function)
        if not callable(found):
            problem = "no function" if found is None else f"a {type(found).__name__} named"
            raise ScorerError(f"constraint.scorer.path={path}: the file has {problem} {function!r}")
        self._function: Callable[..., object] = found

    def score(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        """What the function gives; where it gives no number, why."""
        if self._in_flight == 1 or len(completions) < 2:
            return self._ask(prompts, completions)
        with ThreadPoolExecutor(self._in_flight) as threads:
            pairs = zip(prompts, completions, strict=True)
            found = threads.map(lambda pair: self._ask([pair[0]], [pair[1]]), pairs)
            return [result for one in found for result in one]

    def _ask(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        try:
            results = self._function(list(prompts), list(completions))
        except Exception as error:
            failure = ScoreFailure(f"the function raised {_summary(error, self._file)}")
            return [failure for _ in completions]
        if isinstance(results, np.ndarray):
            results = results.tolist()
        if not isinstance(results, list | tuple):
            raise ScorerError(
                f"the scorer {self.name} returned a {type(results).__name__}; it must return a "
                "list of floats"
            )
        return [_result(value) for value in results]


def _result(value: object) -> Score | ScoreFailure:
    # bool is a number to Python; as a score it is more likely a slip.
    if isinstance(value, bool | np.bool_):
        return ScoreFailure(f"the function returned {value}; return 1.0 or 0.0")
    if not isinstance(value, numbers.Real):
        return ScoreFailure(f"the function returned {value!r}, a {type(value).__name__}, no float")
    return Score(float(value))


def _module(file: Path, digest: str) -> ModuleType:
    # A name of its own: a scorer called json.py must not replace another module.
    name = (
        f"constrained_ft_scorer_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}_{digest[:8]}"
    )
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ScorerError(f"cannot import {file}: {_summary(error, file)}") from error
    return module


def _summary(error: BaseException, file: Path) -> str:
    """An error in one line, with the last line of the user's file that led to it."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    place = f" (line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{place}"
