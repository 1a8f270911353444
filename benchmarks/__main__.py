"""`python -m benchmarks NAME [--json] [options]`."""

import argparse
import json
from importlib import import_module

NAMES = ("deliver", "ingest", "endtoend", "neighbours", "backlog", "processes")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    arguments = parser.parse_args()
    figures = import_module(f"benchmarks.{arguments.name}").measure(arguments.seconds)
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<28} {value}")


if __name__ == "__main__":
    main()
