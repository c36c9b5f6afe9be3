"""``python -m sqlsessions`` is the command ``sqlsessions``."""

import sys

from sqlsessions.cli import main

sys.exit(main())
