"""`python -m benchmarks NAME [--json] [options]`; NAME may be `all`.

`all` writes the figures to docs/design/performance/, and updates the tables and plots.
"""

import argparse
import json
import os
import sys
import traceback
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from benchmarks import plot

NAMES = ("deliver", "ingest", "endtoend", "neighbours", "backlog", "processes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    arguments = parser.parse_args()
    if arguments.name == "all":
        _measure_all(arguments.seconds)
        return
    figures = _measure(arguments.name, arguments.seconds)
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<28} {value}")


def _measure(name: str, seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = import_module(f"benchmarks.{name}").measure(seconds)
    return figures


def _measure_all(seconds: float) -> None:
    """Run one benchmark. A failure is printed, keeps the earlier figures, and stops no other."""
    failed = []
    plot.RESULTS.mkdir(exist_ok=True)
    for name in NAMES:
        print(f"{name}: about {20 * seconds:.0f} s", flush=True)
        try:
            figures = _measure(name, seconds)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        figures |= {"date": datetime.now(UTC).date().isoformat(), "cores": os.cpu_count()}
        (plot.RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot.main()
    print(f"wrote {plot.PAGE}")
    if failed:
        sys.exit(f"failed, with the reason above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
