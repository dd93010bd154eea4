"""`python -m tests.benchmarks NAME [OPTION…]`: figures as JSON lines; a ratio compares two values of the same run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def main() -> None:
    arguments = sys.argv[1:]
    options = next((index for index, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    selected = arguments[:options] or NAMES
    if unknown := [name for name in selected if name not in NAMES]:
        sys.exit(f"no benchmark {', '.join(unknown)}: choose from {', '.join(NAMES)}")
    for name in selected:
        for figure in importlib.import_module(f"tests.benchmarks.{name}").figures(*arguments[options:]):
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
