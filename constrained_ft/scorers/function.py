"""A Python function of the user's: `function(prompts, completions, **columns) -> list[float]`."""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from constrained_ft.errors import ScorerError
from constrained_ft.scorer_config import FunctionScorerConfig
from constrained_ft.scorers.combined import Columns
from constrained_ft.scorers.protocol import Score, ScoreFailure


class FunctionScorer:
    """Calls a function of a file or a module, which is run once, when the scorer is built.

    The function gets `prompts` and `completions` by name, and by position where it names its
    arguments otherwise.
    """

    def __init__(self, config: FunctionScorerConfig) -> None:
        """Find the function.

        Raises:
            ScorerError: if there is none, or what holds it cannot be imported.
        """
        self._in_flight = config.in_flight
        place, _, function = config.path.rpartition(":")
        where = f"constraint.scorer.path={config.path}"
        module, self._file = _from_file(place, where) if place.endswith(".py") else _named(place)
        self.name = f"function {config.path}"
        source = self._file.read_bytes() if self._file is not None else b""
        told = source + (b"" if config.version is None else config.version.encode())
        self.version = hashlib.sha256(told).hexdigest()[:16]
        found: object = vars(module).get(function)
        if not callable(found):
            problem = "no function" if found is None else f"a {type(found).__name__} named"
            kind = "file" if place.endswith(".py") else "module"
            raise ScorerError(f"{where}: the {kind} has {problem} {function!r}")
        self._function: Callable[..., object] = found
        self._by_name = _takes_names(found)
        self._wanted, self._takes_any = _columns_of(found)
        self._columns: Columns = {}

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

    def take_columns(self, columns: Columns) -> None:
        """What else the rows of prompts say."""
        self._columns = columns

    def _more(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        """The columns that the function takes, an entry for each prompt."""
        rows = [self._columns.get(prompt, {}) for prompt in prompts]
        names = dict.fromkeys(name for row in rows for name in row)
        return {
            name: [row.get(name) for row in rows]
            for name in names
            if self._takes_any or name in self._wanted
        }

    def _ask(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Score | ScoreFailure]:
        given = list(prompts), list(completions)
        more = self._more(prompts)
        lacking = [name for name, required in self._wanted.items() if required and name not in more]
        if lacking and self._by_name:
            failure = ScoreFailure(
                f"the function needs {', '.join(lacking)}; name the columns of your prompts that "
                f"hold it: prompts.columns=[{','.join(lacking)}]"
            )
            return [failure for _ in completions]
        try:
            results = (
                self._function(prompts=given[0], completions=given[1], **more)
                if self._by_name
                else self._function(*given)
            )
            if inspect.iscoroutine(results):
                results = asyncio.run(results)
        except Exception as error:
            failure = ScoreFailure(f"the function raised {_summary(error, self._file)}")
            return [failure for _ in completions]
        if isinstance(results, np.ndarray):
            results = results.tolist()
        if not isinstance(results, list | tuple):
            failure = ScoreFailure(
                f"the function returned a {type(results).__name__}; it must return a list of floats"
            )
            return [failure for _ in completions]
        return [_result(value) for value in results]

    @property
    def needs_columns(self) -> bool:
        """Whether it cannot be asked about a text alone."""
        return self._by_name and any(self._wanted.values())


def _takes_names(function: Callable[..., object]) -> bool:
    """Whether it can be called as TRL calls a reward function, by keyword."""
    try:
        inspect.signature(function).bind_partial(prompts=[], completions=[])
    except (TypeError, ValueError):
        return False
    return True


def _columns_of(function: Callable[..., object]) -> tuple[dict[str, bool], bool]:
    """The columns that it names, each with whether it is required, and whether it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}, False
    named = {
        one.name: one.default is one.empty
        for one in parameters
        if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}
        and one.name not in {"prompts", "completions"}
    }
    return named, any(one.kind is one.VAR_KEYWORD for one in parameters)


def _result(value: object) -> Score | ScoreFailure:
    # bool is a number to Python; as a score it is more likely a slip.
    if isinstance(value, bool | np.bool_):
        return ScoreFailure(f"the function returned {value}; return 1.0 or 0.0")
    if not isinstance(value, numbers.Real):
        return ScoreFailure(f"the function returned {value!r}, a {type(value).__name__}, no float")
    return Score(float(value))


def _from_file(filename: str, where: str) -> tuple[ModuleType, Path]:
    file = Path(filename).expanduser().resolve()
    if not file.is_file():
        raise ScorerError(f"{where}: there is no file {file}")
    # A name of its own: a scorer called json.py must not replace another module.
    keys = hashlib.sha256(str(file).encode()), hashlib.sha256(file.read_bytes())
    name = "_".join(["constrained_ft_scorer", *(key.hexdigest()[:8] for key in keys)])
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
    return module, file


def _named(name: str) -> tuple[ModuleType, Path | None]:
    """A module that is installed, or stands in the folder where the command was given."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ScorerError(
            f"cannot import the module {name}: {_summary(error, None)}; install it, start cft in "
            "the folder that holds it, or give a file: FILE.py:FUNCTION"
        ) from error
    return module, None if module.__file__ is None else Path(module.__file__)


def _summary(error: BaseException, file: Path | None) -> str:
    """An error in one line, with the last line of the user's file that led to it."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    place = f" (line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{place}"
