"""Several processes: the failures of ranks are gathered."""

from __future__ import annotations

import os
import time

import pytest

from abiding.testing.ranks import RanksFailedError, run_processes


def goes_wrong(rank: int, how: str) -> int:
    if rank == 1:
        if how == "raises":
            raise ValueError("no such thing")
        if how == "dies":
            os._exit(3)
        time.sleep(1000)
    return rank


@pytest.mark.parametrize(
    ("how", "text"), [("raises", "ValueError: no such thing"), ("dies", "died without a result"), ("hangs", "in time")]
)
def test_failures_of_ranks_are_gathered(how: str, text: str) -> None:
    with pytest.raises(RanksFailedError, match=text) as error:
        run_processes(goes_wrong, 3, how, timeout_s=15 if how == "hangs" else 60)
    assert [outcome.error is None for outcome in error.value.outcomes] == [True, False, True]
    assert error.value.outcomes[2].value == 2
