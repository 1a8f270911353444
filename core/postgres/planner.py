"""SQL conditions that make the planner use one index, independently of statistics.

Statistics are as old as the last analyze, and cached plans are older. For a table that was empty
then, reading all of it looks cheap. The queue is empty in quiet moments: with 200,000 deliveries
due after one, a claim of 200 took 3.3 s.
"""


def equal(column: str, value: str) -> str:
    """Return an equality that only an index on the column can serve.

    A plain equality could also be planned as a join with the whole table.
    """
    return f"{column} = ANY (ARRAY[{value}])"


def hidden(column: str) -> str:
    """Return an expression for the column that no index can serve."""
    return f"least({column})"
