"""Errors a user can act on; each says what, where, what was got and what to do.

CftError            1   anything below
├── PeerError       1   a process of the run is lost, or does not answer
├── ConfigError     2   the command or the configuration is wrong; nothing was started
├── DataError       3   a corpus or a prompt file cannot be used
├── ModelError      3   a model or tokenizer is missing or cannot be used
├── ScorerError     3   the constraint scorer failed or broke its contract
├── SamplerError     3   the sampling server cannot be reached or used; nothing was trained
├── ExtraError      3   a package of an optional extra is not installed
├── CheckpointError 3   a checkpoint cannot be read or written
├── StorageError    3   a disk is full, or a folder cannot be written
├── DivergedError   4   a guard stopped the run; the last good checkpoint is kept
├── SamplingError    4   the sampling server failed; the last checkpoint is kept
├── MissingScoresError 4 too many completions have no score; the last checkpoint is kept
└── Interrupted    75   stopped on request; `--resume` continues

The number is the exit code of the command line.
"""

import errno
import os
import re
from collections.abc import Sequence

__all__ = [
    "CftError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "ExtraError",
    "Interrupted",
    "MissingScoresError",
    "ModelError",
    "PeerError",
    "SamplerError",
    "SamplingError",
    "ScorerError",
    "StorageError",
    "error_named",
    "raise_problems",
    "storage_error",
]

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class CftError(Exception):
    """Base of every error that is the user's to mend; the message is shown without a traceback."""

    exit_code = 1


class PeerError(CftError):
    """Another process of the run is lost, or does not answer; `--resume` continues."""


class ConfigError(CftError):
    """The command line or the configuration is wrong; nothing was started."""

    exit_code = 2


class DataError(CftError):
    """A corpus or a prompt file is missing, empty or malformed."""

    exit_code = 3


class ModelError(CftError):
    """A model or tokenizer is missing or cannot be used."""

    exit_code = 3


class ScorerError(CftError):
    """The constraint scorer could not be loaded, failed, or broke its contract."""

    exit_code = 3


class SamplerError(CftError):
    """The sampling server cannot be reached or used; nothing was trained."""

    exit_code = 3


class ExtraError(CftError):
    """A package of an optional extra is not installed; the message says how to install it."""

    exit_code = 3


class CheckpointError(CftError):
    """A checkpoint cannot be written or read."""

    exit_code = 3


class StorageError(CftError):
    """A disk is full, or a folder cannot be written; `--resume` continues."""

    exit_code = 3


class DivergedError(CftError):
    """A guard stopped the run; the last good checkpoint is kept."""

    exit_code = 4


class MissingScoresError(CftError):
    """Too many completions have no score; the last checkpoint is kept and `--resume` continues."""

    exit_code = 4


class SamplingError(CftError):
    """The sampling server failed; the last checkpoint is kept and `--resume` continues."""

    exit_code = 4


class Interrupted(CftError):
    """The run was asked to stop; it continues with `--resume`."""

    exit_code = 75


def raise_problems(problems: Sequence[str]) -> None:
    """Raise one ConfigError for all problems; none for none."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n".join([f"{len(problems)} problems:", *(f"  {p}" for p in problems)]))


def error_named(kind: str, text: str) -> CftError:
    """An error that another process raised, by its class's name; one of no such name is general."""
    kinds = {one.__name__: one for one in CftError.__subclasses__()}
    return kinds.get(kind, CftError)(text)


def storage_error(error: BaseException) -> StorageError | None:
    """What to say of an error that a full disk or a folder that cannot be written has caused.

    Libraries that are not written in Python say "(os error 28)" and the like.
    """
    said = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError):
        number, where = error.errno, error.filename
    elif said is not None:
        number, where = int(said[1]), None
    else:
        return None
    if number not in _STORAGE:
        return None
    return StorageError(
        f"{where or 'a file'} cannot be used: {os.strerror(number)}; make room, or give access. "
        "What a run has finished is kept, and `cft train --resume` continues"
    )
