"""Figures that can be repeated: one JSON object a benchmark, with its bare loop beside it."""
