"""`python -m maskx`: the command `maskx` where it is not on the path."""

import sys

from maskx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
