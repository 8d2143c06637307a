"""Abiding inside vLLM: ``ABIDING_VLLM=all``, or some of its jobs by name, and vLLM calls Abiding.

vLLM calls :func:`register` itself, through the entry point ``vllm.general_plugins``, in every one of its processes and
before it makes a communicator or a model.
"""

from __future__ import annotations

import os

from abiding.engines._jobs import Engine, Later, Status
from abiding.engines.vllm.linear import LinearJob
from abiding.engines.vllm.moe import MoeJob

VARIABLE = "ABIDING_VLLM"

ENGINE = Engine(
    "vllm",
    [MoeJob(), LinearJob(), *map(Later, ("qk_norm", "all_reduce", "prologue"))],
    how=f"set {VARIABLE}=all or the names of jobs, separated by commas, before vLLM starts",
)


def chosen() -> frozenset[str]:
    """The names that ``ABIDING_VLLM`` holds: of all jobs for "all", none for "", "0" or without the variable."""
    names = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {"", "0"}
    return frozenset(ENGINE.jobs) if names == {"all"} else frozenset(names)


def register() -> dict[str, Status]:
    """Take the jobs that ``ABIDING_VLLM`` names, and release those that it does not; returns what came of each."""
    return ENGINE.register(chosen())
