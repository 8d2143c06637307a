"""``migrate``: rewrite sources."""

PASSES: frozenset[str] = frozenset()
