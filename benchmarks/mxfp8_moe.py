"""Time MXFP8 mixture of experts on this machine: `python benchmarks/mxfp8_moe.py --help`."""

from abiding.testing.benchmarks import main

if __name__ == "__main__":
    main("mxfp8_moe")
