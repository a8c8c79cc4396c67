"""`python -m sprint` is the `sprint` command."""

from sprint.cli import main

main()
