"""``python -m next_core`` is the console script ``next-core``."""

from next_core.cli import main

if __name__ == "__main__":
    main()
