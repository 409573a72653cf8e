"""``python -m tome``: the command line."""

from tome.cli import main

if __name__ == "__main__":
    main()
