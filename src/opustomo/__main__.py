"""``python -m opustomo``."""

import sys

from opustomo.cli import main

if __name__ == "__main__":
    sys.exit(main())
