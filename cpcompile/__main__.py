"""`python -m cpcompile` is the command `cpcompile`."""

from cpcompile.cli import main

if __name__ == "__main__":
    main()
