"""`python -m bridged`."""

import sys

from bridged.cli import main

sys.exit(main())
