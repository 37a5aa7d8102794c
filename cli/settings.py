"""What the options before a command say, and the consoles that follow from it."""

import ctypes
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

__all__ = ["Settings", "settings"]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt(3)
_FILE_WIDTH = 160  # a file has no width of its own; tables get room there


@dataclass
class Settings:
    """The root options."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True
    torchrun: tuple[str, ...] = ()
    """What stands behind `--` after `train`."""

    def console(self, *, stderr: bool = False) -> Console:
        """A console for progress and results, or for errors."""
        console = Console(stderr=stderr, no_color=True if not self.color else None, highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = _FILE_WIDTH
        return console

    def complain(self, message: str) -> None:
        """One error message, nothing else."""
        text = Text("error: ", style="bold red").append(message, style="not bold default")
        self.console(stderr=True).print(text, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for people, such as what to do next; none when quiet."""
        if not self.quiet:
            self.console().print(Text(text), soft_wrap=True)

    def warn(self, message: str) -> None:
        """One line on standard error, also from a signal handler."""
        with suppress(OSError):
            os.write(2, f"\n{message}\n".encode())

    def flags(self) -> list[str]:
        """The same options for a child process."""
        given = {
            "--debug": self.debug,
            "-q": self.quiet,
            "-v": self.verbose,
            "--no-color": not self.color,
        }
        return [flag for flag, is_set in given.items() if is_set]

    def prepare_libraries(self) -> None:
        """What other libraries read when they are imported: how they use memory, what they say."""
        if "torch" in sys.modules:
            return
        _keep_freed_memory()
        if not self.verbose:
            self._quiet_libraries()

    def _quiet_libraries(self) -> None:
        """Keep other libraries' progress bars and advice out of the display."""
        if not sys.warnoptions:  # neither -W nor PYTHONWARNINGS
            # What libraries tell the programmers who use them, such as us.
            warnings.simplefilter("ignore", FutureWarning)
        for name, value in {
            "TRANSFORMERS_VERBOSITY": "error",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
        }.items():
            os.environ.setdefault(name, value)


def _keep_freed_memory() -> None:
    """Let big tensors reuse the memory of earlier ones, in large pages, where Linux offers that.

    glibc gives every block above 32 MB back to the system, which hands it out again in pages of
    4 KB, each cleared and mapped anew: on CPUs that takes a quarter of a training step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages
    # Of up to 1,024 products prepared for one shape each; half of a run's growth, and few recur.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_THRESHOLD, 2**30)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another system, another C library
        return


# Filled by the root callback before any command runs; a process has one command line.
settings = Settings()
