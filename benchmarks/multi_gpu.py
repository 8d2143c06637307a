"""Check and time the collectives between the GPUs of this machine: `python benchmarks/multi_gpu.py --help`."""

from abiding.testing.multi_gpu import main

if __name__ == "__main__":
    main()
