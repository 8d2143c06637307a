"""Inputs of every kernel group, one module a group: cases as frozen dataclasses, sorted REGULAR, ODD, CORNER,
PERFORMANCE and what a group has besides."""
