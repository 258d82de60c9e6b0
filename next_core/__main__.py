"""``python -m next_core`` is the console script ``next-core``."""

from next_core.cli import main

main()
