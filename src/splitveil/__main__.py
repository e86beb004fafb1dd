"""``python -m splitveil``."""

from splitveil.cli import main

if __name__ == "__main__":
    main()
