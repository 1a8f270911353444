"""The rows of docs/operate/metrics.md."""

import re
from typing import NamedTuple

from tests.support.paths import ROOT

PAGE = (ROOT / "docs/operate/metrics.md").read_text()
_ROW = re.compile(
    r"^\| `(postrider_\w+)` \| (\w+) \|([^|]*)\| [^|]+ \| .+ \| [^|`]+\? `(.+)` \|$", re.MULTILINE
)


class Row(NamedTuple):
    kind: str
    labels: frozenset[str]
    query: str


#: By name.
ROWS = {
    name: Row(kind, frozenset(re.findall(r"`(\w+)`", labels)), query.replace("\\|", "|"))
    for name, kind, labels, query in _ROW.findall(PAGE)
}
