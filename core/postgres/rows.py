"""Rows as statement parameters: an array per column, which `unnest` turns back into rows.

The columns are named once, with their SQL types, so an argument cannot end up in another column.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any


class RowColumns:
    """Columns of rows that a statement takes, as SQL text and as arguments.

    `columns` maps attributes of a row to SQL types. The column of the attribute `result.detail` is
    `detail`. The arrays are the parameters from `$first` on.
    """

    def __init__(self, columns: Mapping[str, str], *, first: int = 1):
        self._getters = [attrgetter(attribute) for attribute in columns]
        names = [attribute.rpartition(".")[2] for attribute in columns]
        #: `delivery_id, lease_id, …`
        self.names = ", ".join(names)
        #: `$1::uuid[], $2::text[], …`
        self.arrays = ", ".join(
            f"${number}::{sql_type}[]" for number, sql_type in enumerate(columns.values(), first)
        )
        #: The number of the next free parameter.
        self.next = first + len(columns)

    def arguments(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        """Return one array per column.

        A column without any value is an empty array, which `unnest` fills with nulls, because each
        value that is sent costs time.
        """
        columns = [list(map(get, rows)) for get in self._getters]
        return [c if any(value is not None for value in c) else () for c in columns]
