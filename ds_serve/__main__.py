"""`python -m ds_serve` is `ds-serve`."""

import sys

from ds_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
