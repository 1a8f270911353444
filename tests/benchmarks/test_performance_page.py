"""The parts of the benchmarks that need no processes: ledger, payload, statements, the page."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plot
from benchmarks.chart import Row, chart
from benchmarks.ledger import Ledger, Receipt, percentile
from benchmarks.payload import PAYLOAD, stamp_of, stamped
from benchmarks.promises import PROMISES
from benchmarks.statements import executed_by

SVG = "{http://www.w3.org/2000/svg}"


def test_page_and_plots_match_stored_figures(tmp_path: Path) -> None:
    fresh = tmp_path / "performance.md"
    shutil.copy(plot.PAGE, fresh)
    for path in plot.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    plot.main(fresh, tmp_path)
    assert fresh.read_text() == plot.PAGE.read_text(), "run `python -m benchmarks.plot`"
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_text() for path in plot.RESULTS.glob("*.svg")}
    for name in drawn:
        assert f"(performance/{name})" in fresh.read_text()


def test_every_promise_has_a_measured_figure() -> None:
    for promise in PROMISES:
        figures = json.loads((plot.RESULTS / f"{promise.benchmark}.json").read_text())
        assert isinstance(figures[promise.figure], int | float)
        assert promise.what in plot.table({promise.benchmark: figures})


@pytest.mark.parametrize(("value", "kept"), [(1.49, "yes"), (1.5, "yes"), (1.51, "**no**")])
def test_table_marks_broken_promise(value: float, kept: str) -> None:
    figures = json.loads((plot.RESULTS / "backlog.json").read_text()) | {"claim_ratio": value}
    [line] = [row for row in plot.table({"backlog": figures}).splitlines() if "claim with" in row]
    assert line.split(" | ")[1:4] == ["≤ 1.5", f"{value:g}", kept]


def test_bar_widths_are_proportional() -> None:
    rows = [Row("a", {"x": 100.0, "y": 300.0}, promise=600), Row("b", {"x": 200.0})]
    drawing = ElementTree.fromstring(chart("<Title>", "ms", rows))  # noqa: S314 - our own
    bars = [rect for rect in drawing.iter(f"{SVG}rect") if rect.get("height") == "18"]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == [80.0, 240.0, 160.0]
    texts = [text.text for text in drawing.iter(f"{SVG}text")]
    assert {"<Title>", "400", "200", "x", "y"} <= set(texts)


def test_ledger_is_readable_while_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    reader = Ledger.create(path, 3)
    writer = Ledger(path)
    assert reader.since() == []
    writer.append(7, 1, 10.0, 10.5)
    writer.append(8, 2, 11.0, 11.25)
    assert len(reader) == 2
    assert reader.since(1) == [Receipt(8, 2, 11.0, 11.25)]
    assert [receipt.latency_ms for receipt in reader.since()] == [500.0, 250.0]


def test_percentile_is_an_observed_value() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert percentile(values, 0.5) == 51
    assert percentile(values, 0.99) == 100
    assert percentile([3.0], 0.999) == 3
    with pytest.raises(RuntimeError, match="nothing was received"):
        percentile([], 0.5)


def test_stamped_payload_is_json_of_usual_size() -> None:
    payload = stamped(1795400000.123456, 42)
    assert len(payload) == len(PAYLOAD)
    assert json.loads(payload)["sequence"] == "0000000042"
    assert stamp_of(payload) == (1795400000.123456, 42)


def test_statements_are_counted_by_application() -> None:
    log = (
        b"executed by postrider-delivery: LOG:  execute __asyncpg_stmt_1__: \n"
        b"\tWITH due AS (\n"
        b"\texecuted by postrider-delivery: LOG:  statement: a payload may say so\n"
        b"executed by postrider-delivery: DETAIL:  parameters: $1 = '200'\n"
        b"executed by postrider-server: LOG:  statement: BEGIN;\n"
        b"executed by : LOG:  checkpoint starting: time\n"
        b"executed by postrider-server: LOG:  statement: COMMIT;\n"
    )
    assert executed_by(log) == {"postrider-delivery": 1, "postrider-server": 2}
