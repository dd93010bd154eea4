"""Rendering and loss mask, this service against transformers and TRL's marks, for every template family.

`--family NAME` and `--kind NAME` select rows. The table and the differences are written to stderr, the figures to
stdout. A family is a template in `trl/chat_templates`; a kind is a conversation of `_rendering/conversations.py`.
Ids are compared with `apply_chat_template` of the installed transformers. Masks are compared, up to the end token of
each turn, with the marks of TRL's training template where it renders the same text, otherwise with those of a copy of
the family's own template (`_rendering/marked_templates.py`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks._rendering import families
from tests.benchmarks._rendering.comparison import Comparison, Outcome, compare
from tests.benchmarks._rendering.conversations import conversations
from tests.benchmarks._rendering.reference import Family

COLUMNS = {
    "rendered": None,
    "equal ids": None,
    "equal masks": Outcome.EQUAL,
    "explained": Outcome.EXPLAINED,
    "unexplained": Outcome.UNEXPLAINED,
    "refused": Outcome.REFUSED,
    "refusals explained": Outcome.REFUSAL_EXPLAINED,
    "no marks": Outcome.NO_MARKS,
}
_SHOWN = (Outcome.REFUSED, Outcome.OTHER_IDS, Outcome.UNEXPLAINED, Outcome.NO_MARKS)


def figures(*arguments: str) -> Iterator[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks rendering")
    parser.add_argument("--family", action="append", choices=families.names(), help="may be repeated; default: all")
    parser.add_argument("--kind", action="append", choices=list(conversations()), help="may be repeated; default: all")
    options = parser.parse_args(arguments)
    comparisons = list(compared(options.family or families.names(), options.kind or list(conversations())))
    _print_table(comparisons)
    yield from _figures(comparisons)


def compared(family_names: Iterable[str], kinds: Sequence[str]) -> Iterator[Comparison]:
    """The comparisons of the rows of these kinds in these families."""
    tokenizer = families.train_tokenizer()
    rows = {kind: row for kind, row in conversations().items() if kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        for name in family_names:
            model_dir = families.build_model(name, Path(scratch) / name, tokenizer)
            yield from compare(Family(name, model_dir), rows)


def _print_table(comparisons: Sequence[Comparison]) -> None:
    for it in comparisons:
        if it.outcome in _SHOWN:
            print(f"{it.family} | {it.kind} | {it.outcome}\n{it.detail}\n", file=sys.stderr)
    print(f"\n{'family':24}" + "".join(f"{name:>20}" for name in COLUMNS), file=sys.stderr)
    for family in [*dict.fromkeys(it.family for it in comparisons), "all"]:
        counts = _counts([it for it in comparisons if family in (it.family, "all")])
        print(f"{family:24}" + "".join(f"{counts[name]:>20}" for name in COLUMNS), file=sys.stderr)
    print("\nDifferences explained, rows:", file=sys.stderr)
    for reason, rows in Counter(reason for it in comparisons for reason in it.reasons).most_common():
        print(f"{rows:6} {reason}", file=sys.stderr)


def _counts(comparisons: Sequence[Comparison]) -> dict[str, int]:
    outcomes = Counter(it.outcome for it in comparisons)
    counts = {name: outcomes[outcome] for name, outcome in COLUMNS.items() if outcome is not None}
    same_ids = (Outcome.EQUAL, Outcome.EXPLAINED, Outcome.UNEXPLAINED, Outcome.NO_MARKS)
    return counts | {
        "rendered": len(comparisons) - outcomes[Outcome.NOT_RENDERED],
        "equal ids": sum(outcomes[outcome] for outcome in same_ids),
    }


def _figures(comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    counts, outcomes = _counts(comparisons), Counter(it.outcome for it in comparisons)
    explained_ids = outcomes[Outcome.REFUSAL_EXPLAINED] + outcomes[Outcome.OTHER_IDS_EXPLAINED]
    rendered, with_marks = counts["rendered"], counts["equal ids"] - counts["no marks"]
    yield _figure("families", len({it.family for it in comparisons}), "")
    yield _figure("conversation kinds", len({it.kind for it in comparisons}), "")
    yield _figure("rows that transformers renders", rendered, "rows")
    yield _figure("rows that transformers does not render", outcomes[Outcome.NOT_RENDERED], "rows")
    yield _figure("share of equal ids", _share(counts["equal ids"], rendered - explained_ids), "", must=1)
    yield _figure("rows with other ids or a refusal, explained", explained_ids, "rows")
    yield _figure("share of equal masks, of rows with equal ids", _share(counts["equal masks"], with_marks), "")
    yield _figure(
        "share of masks equal or explained", _share(counts["equal masks"] + counts["explained"], with_marks), "", must=1
    )
    yield _figure("masks with a difference explained", counts["explained"], "rows")
    yield _figure("rows with equal ids without marks to compare", counts["no marks"], "rows")
    agreements = [it.copy_agrees for it in comparisons if it.copy_agrees is not None]
    yield _figure("rows that TRL's template and the marked copy render", len(agreements), "rows")
    yield _figure("share of them with the same marks", _share(sum(agreements), len(agreements)), "", must=1)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _figure(name: str, value: float, unit: str, must: float | None = None) -> dict[str, Any]:
    return {"figure": name, "value": round(value, 4), "unit": unit, "must": must, "better": "higher"}
