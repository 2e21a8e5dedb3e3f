"""Processes that train the same vectors together, each with its share of every step's rows.

Each process holds the same direction and does the same updates, so all that they exchange in a step are sums of a few
numbers: the gradient (R, D) and the rows' losses. They go through gloo, in memory of the CPU, also for models on GPUs.
Weights that are partitioned among them, see zero3.py, take the way that is fastest for their device.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import CDASError, InvalidInputError, ProcessGroupError, expected_got

TIMEOUT_SECONDS = 600.0
_GONE = re.compile("gloo|Connection (closed|reset|refused)|NCCL|Timed out", re.IGNORECASE)  # in a plain RuntimeError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that `torchrun` or `deepspeed` started, once all of them have joined."""

    processes: Processes
    timeout_seconds: float = TIMEOUT_SECONDS

    @classmethod
    @contextmanager
    def join(
        cls, processes: Processes, timeout_seconds: float = TIMEOUT_SECONDS, backend: str = "gloo"
    ) -> Iterator[ProcessGroup]:
        """Wait for the others, and leave the group at the end.

        Args:
            processes: which one this is, of how many.
            timeout_seconds: how long another process may keep this one waiting, before it ends with an error.
            backend: of torch; one beside gloo only for tensors on other devices, as in `cpu:gloo,cuda:nccl`.

        Raises:
            InvalidInputError: nothing says where the others are to be met.
            ProcessGroupError: they did not come in time, or went away.
        """
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            remedy = "Start it with torchrun: torchrun --nproc-per-node N -m cdas_fast.cli train ..."
            raise InvalidInputError(expected_got("environment", " and ".join(missing), "none", remedy))
        group = cls(processes, timeout_seconds)
        with group._explained("joining the group"):
            torch.distributed.init_process_group(
                backend,
                rank=processes.rank,
                world_size=processes.count,
                timeout=timedelta(seconds=timeout_seconds),
            )
        try:
            yield group
        finally:  # else the interpreter aborts at exit
            torch.distributed.destroy_process_group()

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.processes.rank

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.processes.count

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    def total(self, *tensors: Tensor) -> list[Tensor]:
        """Sums over the processes of float32 tensors on the CPU; the same bits in each process.

        They are added in the order of the processes, whatever way they come.
        """
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        with self._explained("adding up gradients"):
            torch.distributed.all_gather(parts, flat)
        for part in parts[1:]:
            parts[0] += part
        sums = parts[0].split([tensor.numel() for tensor in tensors])
        return [total.view(tensor.shape) for total, tensor in zip(sums, tensors, strict=True)]

    def most(self, count: int) -> int:
        """The greatest of the processes' numbers."""
        found = torch.tensor([count])
        with self._explained("comparing numbers"):
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Return when all processes have come here."""
        with self._explained("waiting for the others"):
            torch.distributed.barrier()

    def first(self, act: Callable[[], T]) -> T | None:
        """Let the first process do something, and return when it has; None in the others.

        Raises:
            CDASError: in all processes, if it failed in the first.
        """
        result, error, failed = None, None, ""
        if self.is_first:
            try:
                result = act()
            except CDASError as caught:
                error, failed = caught, str(caught)
        messages = self.tell(failed)
        if error is not None:
            raise error
        if messages[0]:
            raise ProcessGroupError(f"process 0: {messages[0]}")
        return result

    def agree(self, what: str, value: str) -> None:
        """Raise `ProcessGroupError` in all processes unless all of them have the same value."""
        values = self.tell(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                remedy = "All processes have to see the same files and take the same settings."
                raise ProcessGroupError(expected_got(f"{what}: process {rank}", values[0] or "none", other, remedy))

    def tell(self, message: str) -> list[str]:
        """What each process says, in their order."""
        data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with self._explained("telling the others"):
            torch.distributed.all_gather(sizes, torch.tensor([len(data)]))
            longest = max(int(size) for size in sizes)
            padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.count)]
            torch.distributed.all_gather(padded, torch.nn.functional.pad(data, (0, longest - len(data))))
        pairs = zip(padded, sizes, strict=True)
        return [json.loads(bytes(each[: int(size)].tolist())) for each, size in pairs]

    @contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Within the context, what torch raises when another process has gone is a `ProcessGroupError`.

        For work that may also fail for reasons of its own: those are raised as they are.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and not _GONE.search(str(error)):
                raise
            raise self._error(doing, error) from error

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's own kinds derive from it
            raise self._error(doing, error) from error

    def _error(self, doing: str, error: RuntimeError) -> ProcessGroupError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return ProcessGroupError(
            f"process {self.rank} of {self.count}: {doing}: another process has ended, or did not answer within "
            f"{self.timeout_seconds:.0f} seconds ({reason}). Look for its own message, and start all of them again "
            "with --resume."
        )


def share_of_rows(lengths: Sequence[int], processes: Processes) -> list[int]:
    """Places of the rows of this process: of similar tokens in each, the longest row to whom has the fewest so far."""
    loads = [0] * processes.count
    own = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        process = loads.index(min(loads))
        loads[process] += lengths[place]
        if process == processes.rank:
            own.append(place)
    return sorted(own)
