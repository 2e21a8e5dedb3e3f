"""A process of a group, for tests: trains a tiny model with its share of the rows, and may come to grief."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_tokenizer
from tiny_runs import PAIRS, tiny_config

import cdas_fast
from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import CDASError


def main() -> int:
    """See `group_of` in test_process_group.py for what is given."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    processes = Processes.from_environment()
    wanted = given.get("kill", {}).get(str(processes.rank))

    def callback(info: Any) -> None:
        if wanted is not None and info.record.step == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = {**given.get("settings", {}), **given.get("settings_of", {}).get(str(processes.rank), {})}
    try:
        with ProcessGroup.join(processes, given.get("timeout", 60.0)) as group:
            model, _ = cdas_fast.load_model(given["model"], tiny_tokenizer(), dtype="float32", **given["load"])
            result = cdas_fast.train(
                model,
                tiny_tokenizer(),
                PAIRS,
                tiny_config(**settings),
                output_dir=Path(given["output"]),
                resume=given.get("resume", False),
                callback=callback,
                progress=False,
                group=group,
            )
    except CDASError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps([result.vector.direction.tolist(), [record.loss for record in result.history]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
