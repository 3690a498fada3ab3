"""The command line: parse, call, print; one file per command."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program with the arguments of the process."""
    from maskopt.cli import signals  # imports almost nothing, so that interrupts are handled from here on

    with signals.handled():
        signals.open_standard_streams()
        from maskopt.cli.app import app

        app(prog_name="maskopt")
    sys.exit(0)
