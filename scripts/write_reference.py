"""Write docs/reference.md: the command line and every configuration key, out of the code.

python scripts/write_reference.py            write it
python scripts/write_reference.py --check    exit code 1 where it is out of date
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from constrained_ft.cli.main import app
from constrained_ft.groups import default_options, groups, package_file
from constrained_ft.keys import keys_of_schema

FILE = Path(__file__).parent.parent / "docs" / "reference.md"

HEAD = """# Reference

Commands, groups and keys, written by `scripts/write_reference.py` out of the code.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD, "## Commands", *commands(typer.main.get_command(app), "cft")]
    parts += ["## Groups", group_table(), "## Keys", *key_tables()]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def commands(command: Any, path: str) -> Iterator[str]:
    """A section for each command; options of the root once, at the beginning."""
    children = getattr(command, "commands", {})
    if path == "cft" or not children:
        yield from described(command, path)
    for name, child in children.items():
        yield from commands(child, f"{path} {name}")


def described(command: Any, path: str) -> Iterator[str]:
    """A heading, what the command does, and a table of its arguments and options."""
    context = command.make_context(path, [], resilient_parsing=True)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    words = [path, *(f"{metavar(one)}" for one in arguments)]
    yield f"### `{' '.join(words)}`" if path != "cft" else "### `cft`"
    yield plain(command.help or "")
    rows = [(metavar(one), one.help or "") for one in arguments]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    rows += [one.get_help_record(context) for one in options]
    if rows:
        lines = [f"| `{cell(name)}` | {plain(text)} |" for name, text in rows]
        yield "\n".join(["| | |", "| --- | --- |", *lines])


def metavar(param: Any) -> str:
    """What stands for an argument in the usage."""
    name = str(param.metavar or param.name.upper())
    return name if param.required or name.startswith("[") else f"[{name}]"


def plain(text: str) -> str:
    """One line without the terminal's markup."""
    return cell(" ".join(re.sub(r"\[/?(dim)?\]", "", text).split()))


def cell(text: str) -> str:
    """Text that neither ends a table's cell nor turns into italics."""
    return text.replace("|", "\\|").replace("*", "\\*")


def group_table() -> str:
    """Every group and option, with what its file says of itself."""
    defaults = default_options()
    lines = ["| group | options, the default first | says |", "| --- | --- | --- |"]
    for group, options in groups().items():
        ordered = sorted(options, key=lambda option: option != defaults.get(group))
        for option in ordered:
            mark = " (default)" if option == defaults.get(group) else ""
            lines.append(f"| `{group}` | `{option}`{mark} | {about(group, option)} |")
    return "\n".join(lines)


def about(group: str, option: str) -> str:
    """The comment at the top of a group's file."""
    lines = Path(package_file(f"{group}/{option}.yaml")).read_text(encoding="utf-8").splitlines()
    said = []
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("# ") or line.startswith("#   "):
            break
        said.append(line.removeprefix("# "))
    return plain(" ".join(said))


def key_tables() -> Iterator[str]:
    """A table for each section at the top."""
    tables: dict[str, list[str]] = {}
    for key in keys_of_schema().values():
        section, _, rest = key.path.partition(".")
        heading = section if rest or key.is_section else ""
        line = f"| `{key.path}` | {plain(key.allowed)} | {plain(key.doc)} |"
        tables.setdefault(heading, []).append(line)
    for section, lines in tables.items():
        yield f"### `{section}`" if section else "### The run"
        yield "\n".join(["| key | may be | means |", "| --- | --- | --- |", *lines])


def main() -> None:
    """Write the page, or say whether it is up to date."""
    text = reference()
    if sys.argv[1:] == ["--check"]:
        if FILE.read_text(encoding="utf-8") != text:
            sys.exit(f"{FILE} is out of date: python scripts/write_reference.py")
        return
    FILE.write_text(text, encoding="utf-8")
    print(f"{FILE} is written")


if __name__ == "__main__":
    main()
