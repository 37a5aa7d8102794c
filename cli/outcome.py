"""How a run ended, in `status.json`, and what to tell the person who started it."""

import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from constrained_ft.errors import CftError, DivergedError, Interrupted

if TYPE_CHECKING:
    from constrained_ft.run_folder import RunFolder, State

__all__ = ["record"]


def record(folder: "RunFolder", error: BaseException) -> None:
    """Write how a run failed; the error's message says from now on what to do next.

    Where the disk is full, `status.json` stays as it was.
    """
    state: State = "failed"
    code, reason = 1, f"{type(error).__name__}: {error}"
    again = f"`cft train --resume {folder.path}` continues"
    match error:
        case KeyboardInterrupt():
            state, code, reason = "interrupted", 130, "Ctrl-C before training began"
        case CftError():
            code, reason = error.exit_code, str(error)
            if isinstance(error, Interrupted):
                state = "interrupted"
                error.args = (f"{error}; {again}",)
            elif isinstance(error, DivergedError):
                state = "diverged"
        case _:
            with suppress(OSError):
                log = folder.logs() / "error.log"
                log.write_text("".join(traceback.format_exception(error)))
                error.add_note(f"traceback in {log}")
    with suppress(OSError):
        folder.write_status(state, reason=reason, exit_code=code)
