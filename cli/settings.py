"""What the options before a command say, and the consoles that follow from it."""

import os
import sys
import warnings
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

__all__ = ["Settings", "settings"]

_FILE_WIDTH = 160  # a file has no width of its own; tables get room there


@dataclass
class Settings:
    """The root options."""

    debug: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True

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

    def flags(self) -> list[str]:
        """The same options for a child process."""
        given = {
            "--debug": self.debug,
            "-q": self.quiet,
            "-v": self.verbose,
            "--no-color": not self.color,
        }
        return [flag for flag, is_set in given.items() if is_set]

    def quiet_libraries(self) -> None:
        """Keep other libraries' progress bars and advice out of the display, unless -v is given.

        They read these when they are imported.
        """
        if self.verbose or "torch" in sys.modules:
            return
        if not sys.warnoptions:  # neither -W nor PYTHONWARNINGS
            # What libraries tell the programmers who use them, such as us.
            warnings.simplefilter("ignore", FutureWarning)
        for name, value in {
            "TRANSFORMERS_VERBOSITY": "error",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }.items():
            os.environ.setdefault(name, value)


# Filled by the root callback before any command runs; a process has one command line.
settings = Settings()
