"""The command line: parse, call, print; one file per command."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program on the arguments of the process."""
    from maskopt.cli import signals  # imports next to nothing: from here on an interrupt is one sentence

    with signals.handled():
        signals.open_standard_streams()
        from maskopt.cli.app import app

        app(prog_name="maskopt")
    sys.exit(0)
