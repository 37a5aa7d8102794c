"""`cft doctor`: this machine and installation, as text for an issue."""

import typer

from constrained_ft.cli.settings import settings

__all__ = ["doctor"]


def doctor() -> None:
    """Show versions, devices, memory, disk and extras: text for an issue, without secrets."""
    settings.prepare_libraries()
    from constrained_ft.doctor import examine

    health = examine()
    width = max(len(name) for facts in health.facts.values() for name in facts)
    for heading, facts in health.facts.items():
        typer.echo(heading)
        for name, value in facts.items():
            typer.echo(f"  {name:<{width}}  {value}")
    if not health.problems:
        settings.say("\nNothing is amiss. Next: cft train experiment=smoke")
        return
    for problem in health.problems:
        settings.complain(problem)
    raise typer.Exit(3)
