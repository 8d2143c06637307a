"""Write docs/rules.md from the rule table; ``--check`` fails where the file differs."""

from __future__ import annotations

import sys
from pathlib import Path

from abiding_abi.explain import page

PAGE = Path(__file__).parent.parent / "docs" / "rules.md"


def main() -> int:
    """Write or compare."""
    if "--check" in sys.argv[1:]:
        same = PAGE.exists() and PAGE.read_text() == page()
        print(f"{PAGE.name} {'is what the table makes' if same else 'differs: run python tools/make_rules_page.py'}")
        return int(not same)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
