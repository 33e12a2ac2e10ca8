"""`python -m softtdx` is the command line."""

from softtdx.cli import main

main()
