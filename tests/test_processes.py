"""Which of several processes this is, and its share."""

from __future__ import annotations

from typing import Any

import pytest

from cdas_fast.distributed.processes import Processes
from cdas_fast.errors import InvalidInputError


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_disjoint_whole_and_balanced(count: int) -> None:
    sizes = {concept: 1 + (concept * 7919) % 50 for concept in range(40, 0, -1)}
    shares = [Processes(rank, count).share(sizes) for rank in range(count)]
    assert sorted(concept for share in shares for concept in share) == sorted(sizes)
    loads = [sum(sizes[concept] for concept in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert all(share == [concept for concept in sizes if concept in share] for share in shares), "order of the file"


def test_more_processes_than_concepts() -> None:
    assert [Processes(rank, 3).share({5: 10, 6: 2}) for rank in range(3)] == [[5], [6], []]


def test_torchrun_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.from_environment() == Processes(0, 1, 0)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes.from_environment() == Processes(5, 8, 1)


@pytest.mark.parametrize("values", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one"}, {"RANK": "-1"}])
def test_nonsense_in_the_environment_is_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match="expected"):
        Processes.from_environment()
