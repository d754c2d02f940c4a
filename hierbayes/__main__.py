"""``python -m hierbayes`` is the command line."""

import sys

from hierbayes.cli import main

sys.exit(main())
