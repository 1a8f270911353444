"""Repeatable figures: one JSON object per benchmark, with the bare loop of the same run."""
