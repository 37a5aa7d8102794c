"""`cft train --dry-run`: what an iteration is predicted to take."""

from enum import StrEnum
from typing import TYPE_CHECKING

from constrained_ft.cli.settings import settings
from constrained_ft.cli.torchrun import Processes
from constrained_ft.errors import CftError

if TYPE_CHECKING:
    from constrained_ft.config import Config
    from constrained_ft.prediction import Phase, Prediction

__all__ = ["PaperDevice", "show_prediction"]

_COLUMNS = ["", "seconds", "mostly", "sent by a rank"]


class PaperDevice(StrEnum):
    """The devices of `prediction.DEVICES`."""

    h100 = "h100"
    a100 = "a100"


def show_prediction(config: "Config", processes: Processes, on: PaperDevice | None = None) -> None:
    """Seconds, memory and traffic of an iteration, or why they are not predicted.

    Args:
        config: the whole run.
        processes: how many.
        on: a device that is not here; None is what is.
    """
    if settings.quiet:
        return
    from constrained_ft.cli.display import make_display

    settings.prepare_libraries()
    from constrained_ft.prediction import DEVICES, sentence
    from constrained_ft.sizing import assumed_lengths, predict_run, this_device

    lengths = assumed_lengths(config)
    with make_display(settings.console()) as display:
        try:
            device = this_device(processes.per_node) if on is None else DEVICES[on]
            found = predict_run(config, processes.total, device, lengths)
        except CftError as error:
            display.note(f"what it takes is not predicted: {error}")
            return
        many = f"{processes.total} processes" if processes.total > 1 else "1 process"
        display.table(f"One iteration, predicted: {many} on {device.name}", _COLUMNS, _rows(found))
        display.note(sentence(found))
        if on is not None:
            display.note("by numbers of data sheets and an assumed share of them; it was not run")
        display.note(
            f"counted with prompts of {lengths.prompt:g} tokens, completions of "
            f"{lengths.completion:g} and corpus rows of {lengths.row:g}, without scoring and "
            "measuring; docs/scaling.md tells how far such numbers were off"
        )


def _rows(found: "Prediction") -> list[list[str]]:
    """Phases, the iteration, and the memory at its peak."""
    rows = [_row(name, phase) for name, phase in found.phases.items()]
    rows.append(["iteration", f"{found.seconds:.2f}", "", _bytes(found.sent)])
    parts = sorted(found.memory.items(), key=lambda part: -part[1])
    words = ", ".join(f"{name} {_bytes(size)}" for name, size in parts[:3])
    rows.append(["memory of a rank", "–", f"{_bytes(found.peak)}: {words}", "–"])
    return rows


def _row(name: str, phase: "Phase") -> list[str]:
    from constrained_ft.prediction import WORDS

    most = max(phase.seconds, key=lambda resource: phase.seconds[resource])
    return [name, f"{phase.total:.2f}", WORDS[most], _bytes(phase.sent)]


def _bytes(number: int | float) -> str:
    """In the unit that suits, thousands as everywhere else in the tables of memory."""
    if number == 0:
        return "–"
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.1f} MiB"
