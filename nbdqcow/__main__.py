"""``python -m nbdqcow``."""

import sys

from nbdqcow.cli.main import main

sys.exit(main())
