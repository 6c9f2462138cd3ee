"""``python -m instrument`` is the command ``instrument``."""

from instrument.cli import main

main()
