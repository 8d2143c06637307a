"""Times of our kernels and of other libraries', checks between several GPUs, reports: from a checkout, not shipped.

From the repository's root, with `abiding` installed or on PYTHONPATH:

    python -m benchmarks [GROUP]        # times of the kernel groups and, with --peer, of a peer
    python -m benchmarks.compare_builds # two builds, timed by turns
    python -m benchmarks.multi_gpu      # checks and times between the GPUs of this host
    python -m benchmarks.limits         # what limits an MoE layer, by Nsight Compute
    python -m benchmarks.one_call       # one call, for a profiler
    python -m benchmarks.report         # docs/results and the plots, from benchmarks/results
    python -m benchmarks.engines.NAME   # inside vLLM and transformers: see docs/engines_*.md

Each lists its options with `--help`.
"""
