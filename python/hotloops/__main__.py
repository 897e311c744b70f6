"""`python -m hotloops` is the command `hotloops`."""

import sys

from .cli import main

sys.exit(main())
