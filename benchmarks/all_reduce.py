"""Time the all-reduce on this machine: `python benchmarks/all_reduce.py --help`."""

from abiding.testing.benchmarks import main

if __name__ == "__main__":
    main("all_reduce")
