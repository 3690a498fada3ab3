"""`python -m maskopt` is `maskopt`."""

from maskopt.cli import main

main()
