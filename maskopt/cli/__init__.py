"""The command line: parse, call, print; one file per command."""

from maskopt.cli.app import app, main

__all__ = ["app", "main"]
