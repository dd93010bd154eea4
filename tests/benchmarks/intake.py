"""Dataset intake: 2 GB in 10 million lines with planted errors, each run in a new process.

Three runs: only `check_rows` on conversations; `Datasets.upload` (check, SHA-256, copy into the artifact store, flush)
on the same file; only `check_rows` on a tenth as many prompts with completions. The file has just been written, so
most of it is read from memory; the copy is written to disk.

- rate: by wall clock, so run it alone on the machine; and by CPU time, which is that of one core;
- peak RSS: of the whole process with its imports;
- a planted error is found if line, byte offset, reason and JSON pointer are right; `upload` reports the first hundred
  findings and counts all.

QLORA_BENCH_ROWS sets the number of lines; their mean length stays the same.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from qlora_service.actions.service import open_service
from qlora_service.data.files.checks import MAX_FINDINGS, check_rows
from qlora_service.data.rows.examples import Shape
from qlora_service.errors import Finding
from tests.planted_errors import MALFORMED, PLANTED, Planted, chat_line

ROOT = Path(__file__).parent.parent.parent
ROWS = int(os.environ.get("QLORA_BENCH_ROWS", "10000000"))
ERRORS_PER_KIND = 30
"""Planted errors of each kind; the too long line is planted once"""
MB_PER_S, RSS_MB = 40, 256
DISTINCT_ROWS = 20_000
"""Number of different rows, which are repeated"""
SENTENCE = 'the order of which Frau Müller said "soon" is\n42 days late; please ship № 4711 to Kraków now 🙂'


@dataclass(frozen=True)
class Upload:
    """A file with planted errors."""

    path: Path
    shape: Shape
    rows: int
    errors: list[tuple[int, int, Planted]]
    """Line, byte offset and planted error"""


def figures() -> Iterator[dict[str, Any]]:
    # Not /tmp, which may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        scratch = Path(name)
        conversations = _write(scratch / "messages.jsonl", "messages", _conversation, ROWS, PLANTED)
        yield from _figures("check", conversations, _run("check", conversations))
        yield from _figures("upload", conversations, _run("upload", conversations))
        conversations.path.unlink()
        pairs = _write(scratch / "pairs.jsonl", "prompt_completion", _pair, ROWS // 10, MALFORMED)
        yield from _figures("check of prompts and completions", pairs, _run("check", pairs))


def main(action: str, path: Path, shape: Shape) -> None:
    """Runs the action, and prints its time, memory and findings as JSON."""
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        work = partial(_check, path, shape) if action == "check" else _upload_to_service(path, Path(name))
        started, cpu_started = time.perf_counter(), time.process_time()
        finding_count, findings = work()
        measured = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_rss_bytes": _peak_rss_bytes(),
            "finding_count": finding_count,
            "findings": [finding.as_dict() for finding in findings],
        }
    print(json.dumps(measured))


def _write(
    path: Path, shape: Shape, row: Callable[[random.Random], bytes], rows: int, planted: Sequence[Planted]
) -> Upload:
    """A file of `rows` lines, including errors and blank lines."""
    generator = random.Random(5)
    valid = [row(generator) + b"\n" for _ in range(DISTINCT_ROWS)]
    chosen = [error for error in planted for _ in range(1 if len(error.line) > 2**20 else ERRORS_PER_KIND)]
    generator.shuffle(chosen)
    error_lines = sorted(generator.sample(range(100, rows), len(chosen)))
    errors, line = [], 1
    with path.open("wb", buffering=2**20) as file:
        for error_line, error in zip(error_lines, chosen, strict=True):
            file.writelines(_lines(valid, error_line - line))
            errors.append((error_line, file.tell(), error))
            file.writelines([error.line, b"\n"])
            line = error_line + 1
        file.writelines(_lines(valid, rows + 1 - line))
        file.flush()
        os.fsync(file.fileno())
    return Upload(path, shape, rows, errors)


def _lines(valid: list[bytes], count: int) -> Iterator[bytes]:
    """Valid rows, with one blank line in a thousand."""
    return (b" \r\n" if index % 1000 == 999 else valid[index % DISTINCT_ROWS] for index in range(count))


def _conversation(generator: random.Random) -> bytes:
    line = chat_line(_text(generator, 9), _text(generator, 12))
    # Half of the rows have ASCII escapes, as many tools write them.
    return line if generator.random() < 0.5 else json.dumps(json.loads(line)).encode()


def _pair(generator: random.Random) -> bytes:
    row = {"prompt": _text(generator, 14), "completion": _text(generator, 14)}
    return json.dumps(row, ensure_ascii=generator.random() < 0.5).encode()


def _text(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(SENTENCE.split(" "), k=generator.randint(words // 2, words * 3 // 2)))


def _run(action: str, upload: Upload) -> dict[str, Any]:
    """The measurements of `main` in a new process."""
    # Started through `process.child`, which ends the run when the benchmark dies.
    command = [sys.executable, "-m", "qlora_service.process.child", str(os.getpid()), "-m", "tests.benchmarks.intake"]
    child = subprocess.run(
        [*command, action, str(upload.path), upload.shape], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return measured


def _figures(name: str, upload: Upload, measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    megabytes = upload.path.stat().st_size / 1e6
    title = f"{name}, {megabytes / 1e3:.2f} GB in {upload.rows / 1e6:g} M lines"
    reported = upload.errors if name != "upload" else upload.errors[:MAX_FINDINGS]
    by_line = {finding["line"]: finding for finding in measured["findings"]}
    found = sum(_is_found(by_line.get(line), offset, error) for line, offset, error in reported)
    yield _figure(f"{title}: rate", megabytes / measured["seconds"], "MB/s", MB_PER_S)
    yield _figure(f"{title}: rate by CPU time of all threads", megabytes / measured["cpu_seconds"], "MB/s", MB_PER_S)
    yield _figure(f"{title}: peak RSS", measured["peak_rss_bytes"] / 1e6, "MB", RSS_MB, better="lower")
    yield _figure(f"{name}: planted errors found, of {len(reported)}", found, "", len(reported))
    not_planted = measured["finding_count"] - len(upload.errors)
    yield _figure(f"{name}: findings counted beyond the {len(upload.errors)} planted", not_planted, "", 0, "lower")


def _is_found(finding: dict[str, Any] | None, offset: int, error: Planted) -> bool:
    if finding is None:
        return False
    position = (finding["byte_offset"], finding["pointer"])
    return position == (offset, error.pointer) and error.reason in finding["reason"]


def _figure(name: str, value: float, unit: str, must: float | None = None, better: str = "higher") -> dict[str, Any]:
    return {"figure": name, "value": round(value, 1), "unit": unit, "must": must, "better": better}


Findings = tuple[int, Sequence[Finding]]
"""The number of findings, and the reported ones"""


def _check(path: Path, shape: Shape) -> Findings:
    findings = [result for result in check_rows(path, "jsonl", shape) if isinstance(result, Finding)]
    return len(findings), findings


def _upload_to_service(path: Path, data: Path) -> Callable[[], Findings]:
    """A function that uploads the file to a service over an empty directory."""
    service = open_service(
        database_url=f"sqlite:///{data / 'state.db'}",
        artifact_url=(data / "artifacts").as_uri(),
        models_dir=data / "models",
        tmp_dir=data / "tmp",
        lease_s=60,
    )

    def work() -> Findings:
        report = service.datasets.upload(path, filename=path.name).report
        return report.finding_count, report.findings

    return work


def _peak_rss_bytes() -> int:
    """Peak resident memory of this program; `getrusage` would include that of its parent before the exec."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert peak is not None
    return int(peak.group(1)) * 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), cast(Shape, sys.argv[3]))
