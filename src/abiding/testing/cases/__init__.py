"""Inputs of every kernel group, one module a group: cases as frozen dataclasses, sorted REGULAR, ODD, CORNER and
PERFORMANCE."""
