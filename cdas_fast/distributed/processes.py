"""Which of several processes this is, and its share of the concepts. They do not talk to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cdas_fast.errors import InvalidInputError, expected_got


@dataclass(frozen=True)
class Processes:
    """One of `count` processes that train the same pairs."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of its machine

    @classmethod
    def from_environment(cls) -> Processes:
        """As `torchrun` says by RANK, WORLD_SIZE and LOCAL_RANK; a single process without it."""
        try:
            rank, count, local_rank = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise InvalidInputError(expected_got("RANK, WORLD_SIZE, LOCAL_RANK", "whole numbers", error)) from error
        if not 0 <= rank < count or local_rank < 0:
            wanted = "0 <= RANK < WORLD_SIZE and LOCAL_RANK >= 0"
            raise InvalidInputError(expected_got("environment", wanted, f"{rank}, {count}, {local_rank}"))
        return cls(rank, count, local_rank)

    def share(self, sizes: Mapping[int, int]) -> list[int]:
        """The concepts of this process, in their order.

        The largest goes to the process with the least so far, and so on; the processes need not ask each other.

        Args:
            sizes: the work of each concept, such as its pairs.
        """
        loads = [0] * self.count
        own = []
        for concept in sorted(sizes, key=lambda concept: (-sizes[concept], concept)):
            process = loads.index(min(loads))
            loads[process] += sizes[concept]
            if process == self.rank:
                own.append(concept)
        return [concept for concept in sizes if concept in own]
