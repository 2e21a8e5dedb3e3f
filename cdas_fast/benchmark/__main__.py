"""The process in which `memory.peak_in_child` has one call measured: `python -m cdas_fast.benchmark SUBJECT JSON`.

It prints one line of JSON, the peak or why it is unknown.
"""

from __future__ import annotations

import json
import sys

from cdas_fast.benchmark import intervention, loss, training
from cdas_fast.benchmark.memory import PeakUnknownError, peak_on_cpu

_CALLS = {"loss": loss.memory_call, "interchange": intervention.memory_call, "train": training.memory_call}


def main(subject: str, settings: str) -> None:
    """Measure the second of two calls: the first compiles, loads libraries and starts threads."""
    call = _CALLS[subject](json.loads(settings))
    call()
    try:
        answer: dict[str, int | str] = {"peak_bytes": peak_on_cpu(call)}
    except PeakUnknownError as error:
        answer = {"unknown": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
