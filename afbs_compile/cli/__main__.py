"""``python -m afbs_compile.cli``: the command line where the script is not on the path."""

import sys

from afbs_compile.cli.main import main

sys.exit(main())
