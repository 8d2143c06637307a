"""Time the reduce-RMS on this machine: `python benchmarks/reduce_rms.py --help`."""

from abiding.testing.benchmarks import main

if __name__ == "__main__":
    main("reduce_rms")
