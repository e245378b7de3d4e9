"""`python -m crucible.cli`: the command where no script of that name is on the path."""

from crucible.cli.main import main

main()
