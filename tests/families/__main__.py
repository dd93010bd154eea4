"""Every class in transformers' causal-LM mapping as a tiny random model: imported, posted, trained, certified.

    python -m tests.families [--output FILE] [--logs DIRECTORY] [MODEL_TYPE …]

Prints a line per family and a summary, and writes them to a JSON file; `--logs` keeps each family's output. Ends with
code 1 if a family fails in the worker, crashes, or runs past its time limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from tests.families._isolated import outcomes
from tests.families._trial import Outcome
from tests.families.tiny import FAMILIES

BAD = {"failed in the worker", "crashed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("families.json"))
    parser.add_argument("--logs", type=Path)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE")
    arguments = parser.parse_args()
    if unknown := set(arguments.model_types) - set(FAMILIES):
        parser.error(f"transformers has no causal language model of type {', '.join(sorted(unknown))}")
    found = []
    for outcome in outcomes(arguments.model_types or sorted(FAMILIES), arguments.logs):
        found.append(outcome)
        print(_line(outcome), flush=True)
    counts = Counter(outcome.result for outcome in found)
    print(f"{len(found)} families: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()))
    document = {"counts": counts, "families": [outcome.as_dict() for outcome in found]}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(outcome.result in BAD for outcome in found))


def _line(outcome: Outcome) -> str:
    losses = "" if outcome.held_out is None else f"{outcome.held_out[0]:.4f} → {outcome.held_out[1]:.4f} "
    return f"{outcome.model_type:24} {outcome.architecture:36} {outcome.result:21} {losses}{outcome.reason}"


if __name__ == "__main__":
    main()
