"""Child process of a simulation: a request as a line of JSON on stdin, the answer or a reason as JSON on stdout.

A request with a step asks for its memory, one without for the result of attaching the adapter.

Run as `python -m qlora_service.planning.simulation.child` by `planning.simulation.run`, which limits its time.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings

from qlora_service.planning.largest_step import largest_step
from qlora_service.process.startup import end_process, importing_torch
from qlora_service.specs import JobSpec

MEMORY_BYTES = 4 << 30


def main() -> None:
    with importing_torch():
        from qlora_service.planning.simulation.simulated_attachment import simulated_attachment
        from qlora_service.planning.simulation.simulated_step import simulated_memory

    # A forged config.json may request a billion layers.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    request = json.loads(sys.stdin.readline())
    warnings.simplefilter("ignore")
    spec = JobSpec.model_validate(request.pop("spec"))
    try:
        if "micro_batch_tokens" in request:
            step = largest_step(
                spec, micro_batch_tokens=request.pop("micro_batch_tokens"), longest_tokens=request.pop("longest_tokens")
            )
            answer = simulated_memory(request.pop("config"), spec, step, **request).as_dict()
        else:
            answer = simulated_attachment(request["config"], spec).as_dict()
    except Exception as error:  # noqa: BLE001 - the parent reports any error as the reason
        answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
    end_process(0)
