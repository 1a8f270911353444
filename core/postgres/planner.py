"""Conditions that are met by one index, whatever the planner thinks of the table.

What it thinks is as old as the last look at the statistics, and a plan is kept for longer: of a
table that was empty then, or short, every way to read all of it looks cheap. The queue is empty at
any quiet moment: with 200,000 deliveries due after one, a claim of 200 took 3.3 s.
"""


def equal(column: str, value: str) -> str:
    """That they are equal: by an index that begins with the column.

    An equality could also be planned as a join with all of the table.
    """
    return f"{column} = ANY (ARRAY[{value}])"


def hidden(column: str) -> str:
    """What the column has, for rows that are found by another: no index of it is read."""
    return f"least({column})"
