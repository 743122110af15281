"""`python -m triflash`, the same as `triflash`."""

import sys

from triflash.cli import main

sys.exit(main())
