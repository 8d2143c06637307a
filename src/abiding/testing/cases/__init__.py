"""Test cases, one module per kernel group: frozen dataclasses, in the lists REGULAR, ODD, CORNER and PERFORMANCE."""
