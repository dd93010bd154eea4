"""`python -m tests.benchmarks NAME`: figures as JSON lines, each a ratio of two things measured in one run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def main() -> None:
    wanted = sys.argv[1:] or NAMES
    if unknown := [name for name in wanted if name not in NAMES]:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    for name in wanted:
        for figure in importlib.import_module(f"tests.benchmarks.{name}").figures():
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
