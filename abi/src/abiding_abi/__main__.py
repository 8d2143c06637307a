"""``python -m abiding_abi``."""

from abiding_abi.cli import main

main()
