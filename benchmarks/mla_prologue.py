"""Time the DeepSeek V4 MLA prologue on this machine: `python benchmarks/mla_prologue.py --help`."""

from abiding.testing.benchmarks import main

if __name__ == "__main__":
    main("mla_prologue")
