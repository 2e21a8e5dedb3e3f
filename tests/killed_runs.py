"""Runs that are killed at random moments and resumed, for test_killed_runs.py; every process forks from this one.

    python killed_runs.py MODEL FOLDER PROCESSES KILLS SEED

trains MODEL from FOLDER/whole on without a kill, then again and again in FOLDER/0, FOLDER/1, ..., each killed once or
more, until so many kills have been. Prints a JSON line for each run that was started.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_runs import tiny_config
from zero3_worker import free_port

import cdas_fast
from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import CDASError
from cdas_fast.training import cache, layer_order, loop

TIMEOUT = 120.0  # seconds, of a group


@dataclass(frozen=True)
class Job:
    """A run of training."""

    model: Path
    data: Path
    output: Path
    resume: bool


@dataclass
class Attempt:
    """One start of a run, in all of its processes."""

    folder: str
    resumed: bool
    killed: list[int]  # processes that a signal ended
    exits: dict[int, int]  # exit codes of the others
    moments: dict[int, list[str]]  # what each process came to
    seconds: float


def train(job: Job, processes: Processes) -> None:
    """Train a streamed model, as one of several processes if there are more."""
    joined = ProcessGroup.join(processes, TIMEOUT) if processes.count > 1 else nullcontext(None)
    with joined as group:
        cdas_fast.train(
            job.model,
            None,
            job.data,
            tiny_config(checkpoint_every=2, epochs=3, micro_batch_tokens=150),
            output_dir=job.output,
            resume=job.resume,
            device="cpu",
            resident_layers=1,
            progress=False,
            group=group,
        )


def start(job: Job, processes: Processes, port: int, pipe: int) -> int:
    """Fork a process that says in the pipe what it comes to."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own_through, own_step = layer_order.LayerOrderPass._through, loop._Schedule._step

    def moment(what: str) -> None:
        os.write(pipe, f"{processes.rank} {what}\n".encode())

    def through(self: Any, layer: int, *args: Any) -> None:
        moment(f"layer {layer}")
        own_through(self, layer, *args)

    def step(self: Any) -> Any:
        moment("step")
        return own_step(self)

    replaced: list[tuple[Any, str, Any]] = [
        (layer_order.LayerOrderPass, "_through", through),
        (loop._Schedule, "_step", step),
        (cache, "require_finite", lambda *args: moment("alone")),  # of sequences that were not cached in layer order
    ]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    code = 99
    try:
        train(job, processes)
        code = 0
    except CDASError as error:
        moment(f"error {' '.join(str(error).split())}")
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def attempt(job: Job, count: int, victims: Sequence[int] = (), after: int = 0, delay: float = 0.0) -> Attempt:
    """Run to the end, or until `delay` seconds after the first victim came to moment `after`."""
    reading, writing = os.pipe()
    port, began = free_port(), time.monotonic()
    children = [start(job, Processes(rank, count), port, writing) for rank in range(count)]
    os.close(writing)
    moments: dict[int, list[str]] = {rank: [] for rank in range(count)}
    with os.fdopen(reading) as lines:
        for line in lines:
            rank, what = line.rstrip("\n").split(" ", 1)
            moments[int(rank)].append(what)
            if victims and int(rank) == victims[0] and len(moments[victims[0]]) == after:
                time.sleep(delay)
                for victim in victims:
                    os.kill(children[victim], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    killed = [rank for rank, code in enumerate(codes) if code == -signal.SIGKILL]
    exits = {rank: code for rank, code in enumerate(codes) if rank not in killed}
    return Attempt(job.output.name, job.resume, killed, exits, moments, time.monotonic() - began)


def main(model: Path, folder: Path, count: int, kills: int, seed: int) -> None:
    """See the module."""
    torch.set_num_threads(1)  # and no thread of torch's is there when processes fork
    order: Any = layer_order
    order.CHECKPOINT_SECONDS, order.time = 0.0, SimpleNamespace(monotonic=lambda: 0.0)  # a checkpoint after each layer
    cdas_fast.load_model(model, device="cpu", resident_layers=0)
    chance, data = random.Random(seed), folder / "pairs.jsonl"
    whole = attempt(Job(model, data, folder / "whole", resume=False), count)
    say(whole)
    total = len(whole.moments[0])
    done = number = 0
    while done < kills:
        output, resume = folder / str(number), False
        while True:
            victims = sorted(chance.choice([[0], [0, 1]] if count == 1 else [[0], [1], [0, 1]])[:count])
            chance.shuffle(victims)
            wanted = done < kills and (not resume or chance.random() < 0.4)
            found = attempt(
                Job(model, data, output, resume and output.exists()),
                count,
                victims if wanted else (),
                after=chance.randrange(1, total),
                delay=chance.uniform(0, 2 * whole.seconds / total),
            )
            say(found)
            done, resume = done + bool(found.killed), True
            if not found.killed:
                break
        number += 1


def say(found: Attempt) -> None:
    """To whoever started this."""
    print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
