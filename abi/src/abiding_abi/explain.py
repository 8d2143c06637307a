"""``explain RULE``, and the documentation page that the rule table makes."""

from __future__ import annotations

from abiding_abi import rules
from abiding_abi.rules import Rule

_KINDS = {
    "mechanical": "mechanical: migrate rewrites it by name",
    "context": "context: migrate rewrites it once types, constness or scope are known",
    "decide": "decide: a person chooses; migrate marks the place with ABI-TODO",
}


def explain(code: str) -> str:
    """Everything about one rule."""
    rule = rules.find(code)
    lines = [
        f"{rule.code}  {rule.legacy}",
        f"  use       {rule.stable}",
        f"  why       {rule.why or rules.GROUPS[rule.group][1]}",
        f"  headers   torch {rule.headers}: the first whose headers compile the replacement",
        f"  runs on   torch {rule.runs}: the oldest that the result needs",
        f"  kind      {_KINDS[rule.kind]}",
    ]
    if rule.pitfall:
        lines.append(f"  beware    {rule.pitfall}")
    lines += ["  before", *_indented(rule.before)]
    if rule.after:
        lines += ["  after", *_indented(rule.after)]
    lines.append(f"  silence   // abi: allow({rule.code}) and the reason, on the line or above it")
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def listing() -> str:
    """One line per rule."""
    return "\n".join(f"{rule.code}  {rule.legacy}" for rule in rules.table())


def page() -> str:
    """The documentation page in Markdown."""
    lines = [
        "# Rules",
        "",
        "Made from the rule table by `python tools/make_rules_page.py`; do not edit.",
        "",
        "**headers**: the first torch whose headers compile the replacement.",
        "**runs on**: the oldest torch that the result needs. Where it is lower than *headers*, build with newer",
        "headers and target the old release.",
        "**kind**: mechanical by name; by context, once types, constness or scope are known; or a person decides.",
        "**level**: unstable, outside the stable ABI; wrong, compiles and misbehaves; note, shown with `--notes`.",
    ]
    for group, (title, why) in rules.GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            why,
            "",
            _row(("rule", "legacy", "replacement", "headers", "runs on", "kind", "level", "beware")),
        ]
        lines.append(_row(("---",) * 8))
        lines += [_rule_row(rule) for rule in rules.table() if rule.group == group]
    return "\n".join(lines) + "\n"


def _rule_row(rule: Rule) -> str:
    beware = " ".join(part for part in (rule.why, rule.pitfall) if part)
    return _row(
        (rule.code, _code(rule.legacy), _code(rule.stable), rule.headers, rule.runs, rule.kind, rule.level, beware)
    )


def _code(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
