"""Conditions that are met by one index, whatever the planner thinks of the table.

What it thinks is as old as the last look at the statistics, and a plan is kept for longer: of a
table that was empty then, or short, every way to read all of it looks cheap.
"""


def equal(column: str, value: str) -> str:
    """That they are equal: by an index that begins with the column.

    An equality could also be planned as a join with all of the table.
    """
    return f"{column} = ANY (ARRAY[{value}])"
