"""Kill, signal, corrupt and slow down small runs, and see that nothing is lost.

    python scripts/chaos.py short              what CI runs, about two minutes
    python scripts/chaos.py kill --count 50    one kind of trouble, as often as asked: 200 kills,
                                               50 of each schedule with one process and with two
    python scripts/chaos.py all                everything, about an hour; docs/reliability.md has it

Every kind prints what it did; the exit code is 1 where a promise was broken. Runs are compared by
the SHA-256 of every file of the final models and of the newest checkpoint.
"""

import argparse
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

from chaos_files import corrupt, failpoints, full
from chaos_processes import boundaries, frozen, kill, ranks, sleeps, soak, term
from chaos_runs import KINDS, Broken

SCENARIOS = {
    "kill": (kill, 20),
    "term": (term, 20),
    "boundaries": (boundaries, 8),
    "ranks": (ranks, 2),
    "frozen": (frozen, 4),
    "sleeps": (sleeps, 50),
    "failpoints": (failpoints, 1),
    "full": (full, 40),
    "corrupt": (corrupt, 500),
    "soak": (soak, 300),
}
SHORT = {  # how often, and to which kind of run
    "failpoints": (1, "overlapped"),
    "full": (3, "overlapped"),
    "corrupt": (60, "overlapped"),
    "kill": (2, "overlapped"),
    "term": (2, "overlapped"),
    "ranks": (1, "overlapped peers"),
}


def main() -> int:
    """Cause the trouble that is asked for; the exit code says whether every promise was kept."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[*SCENARIOS, "short", "all"])
    parser.add_argument("--count", type=int, help="how often")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind of run; all otherwise")
    arguments = parser.parse_args()
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    chosen = (
        {name: (count, [kind]) for name, (count, kind) in SHORT.items()}
        if arguments.what == "short"
        else {
            name: (arguments.count or usual, kinds)
            for name, (_, usual) in SCENARIOS.items()
            if arguments.what in (name, "all")
        }
    )
    broken = 0
    print(f"on {socket.gethostname()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="cft-chaos-") as place:
        for name, (count, those) in chosen.items():
            begun = time.monotonic()
            try:
                SCENARIOS[name][0](Path(place), count, those)
            except Broken as error:
                print(f"{name}: BROKEN: {error}")
                broken += 1
            print(f"  {name} took {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
