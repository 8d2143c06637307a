"""`python -m abiding`."""

from abiding.cli import main

if __name__ == "__main__":
    main()
