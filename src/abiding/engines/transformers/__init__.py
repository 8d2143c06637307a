"""Abiding inside transformers: after :func:`register`, ``experts_implementation="abiding"`` runs MXFP8 experts.

Two jobs: ``experts`` adds the name "abiding" to transformers' registries of experts implementations, which a model
chooses by its configuration; ``linear`` takes the FP8 linear layers of every model in the process. Layers that Abiding
cannot compute stay with transformers, with one log line per reason.
"""

from __future__ import annotations

from collections.abc import Iterable

from abiding.engines._jobs import Engine, Status
from abiding.engines.transformers._experts import Experts
from abiding.engines.transformers._linear import Linear
from abiding.mxfp8_moe import Mode

# Not "fp8": it would change the weights, which stay in the model for transformers to save and to compute with.
MODES: tuple[Mode, ...] = ("w8a16", "w8a8")

_experts, _linear = Experts(), Linear()

ENGINE = Engine(
    "transformers",
    [_experts, _linear],
    how='call abiding.engines.transformers.register(), and load the model with experts_implementation="abiding"',
)


def chosen() -> frozenset[str]:
    """The jobs that this process has registered: transformers has no setting outside of it."""
    return frozenset(name for name, status in ENGINE.status().items() if status.state != "off")


def register(jobs: Iterable[str] = ("experts", "linear"), *, mode: Mode = "w8a16") -> dict[str, Status]:
    """Take the jobs, and release those that are not named; returns what came of each, and raises nothing.

    Call it before or after a model is loaded, as often as you like: a job is taken once.

    Args:
        jobs: "experts", "linear" or both.
        mode: what experts do with activations, as in :func:`abiding.mxfp8_moe.moe`: "w8a16" leaves them bfloat16,
            "w8a8" quantizes them to MXFP8. Linear layers follow. With any other mode nothing changes.
    """
    if mode not in MODES:
        ENGINE.log.warning("abiding: mode is %r; expected %s", mode, " or ".join(MODES))
        return ENGINE.status()
    _experts.mode = _linear.mode = mode
    return ENGINE.register(jobs)


def unregister() -> dict[str, Status]:
    """Leave transformers as it was. A model that has chosen "abiding" must choose another implementation."""
    return ENGINE.register(())
