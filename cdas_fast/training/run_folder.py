"""The folder of a run: its log, its checkpoint, and what may be resumed there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cdas_fast.errors import InvalidInputError, StorageError, expected_got
from cdas_fast.storage import make_output_folder, read_tensors, write_tensors, write_text

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"  # the one before, of a concept that trains beside others
LOG = "training_log.jsonl"
ARTIFACT_CONFIG = "config.json"  # written last: its presence says that the run is complete
REPORT = "report.html"
ACTIVATIONS = ".activations"  # until the run is complete, unless they are kept elsewhere


@dataclass(frozen=True)
class StepRecord:
    """One line of `training_log.jsonl`. Losses are in nats."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step, as the reduction says
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # base tokens beyond the prefix that the step's suffix pass had to do
    seconds: float
    minibatch_losses: tuple[float, ...]
    held_out_loss: float | None = None  # after the last step of an evaluated epoch

    def to_line(self) -> str:
        """The record as a line of JSON."""
        values = dataclasses.asdict(self)
        if self.held_out_loss is None:
            del values["held_out_loss"]
        return json.dumps(values) + "\n"

    @classmethod
    def from_line(cls, line: str) -> StepRecord:
        """Read a line of the log."""
        values = json.loads(line)
        return cls(**{**values, "minibatch_losses": tuple(values["minibatch_losses"])})


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` steps: the direction and AdamW's moments, (R, D) each."""

    step: int
    direction: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    round: int = 0  # of the run's steps over all concepts
    company: str = ""  # hash of the concepts that the run trains, and of how many at a time
    best: Tensor | None = None  # (R, D), the direction with the lowest held-out loss, if the run may stop early


def refuse_used_folder(path: str | os.PathLike[str]) -> None:
    """Raise `InvalidInputError` if there is anything at `path` but an empty folder or a killed run's scraps."""
    path = Path(path)
    if not path.exists():
        return
    entries = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else ["a file"]
    entries = [name for name in entries if not _is_scrap(name) and name != ACTIVATIONS]
    if entries:
        what = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
        begun = CHECKPOINT in entries or any(path.glob(f"concept_*/{CHECKPOINT}"))
        remedy = "Choose another one" + (", or resume the run there." if begun else ".")
        raise InvalidInputError(expected_got(f"output folder {path}", "a new or empty folder", what, remedy))


def _is_scrap(name: str) -> bool:
    """Whether a file is one that a killed process may leave behind half-written."""
    return name.startswith(".") and name.endswith(".partial")


class RunFolder:
    """Files of one run. A folder that holds anything is only touched to resume the very same run."""

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)

    def prepare(self, resume: bool) -> tuple[Checkpoint, ...]:
        """Make the folder, or find the checkpoints to go on from, the newest first.

        Nothing that is there is changed unless it is resumed.

        Raises:
            InvalidInputError: the folder is not empty and not to be resumed, or its run had other settings.
            StorageError: the folder cannot be written, or the checkpoint is broken.
        """
        make_output_folder(self.path)
        entries = sorted(entry.name for entry in self.path.iterdir())
        if not resume:
            refuse_used_folder(self.path)
        for scrap in filter(_is_scrap, entries):
            (self.path / scrap).unlink()
        entries = [name for name in entries if not _is_scrap(name) and name != ACTIVATIONS]
        if not entries:
            return ()
        if not {CHECKPOINT, PREVIOUS} & set(entries):
            if set(entries) <= {LOG}:
                return ()  # ended before its first checkpoint
            raise InvalidInputError(
                expected_got(f"output folder {self.path}", f"a {CHECKPOINT} to resume from", ", ".join(entries[:4]))
            )
        return tuple(self._read_checkpoint(name) for name in (CHECKPOINT, PREVIOUS) if name in entries)

    def save(self, checkpoint: Checkpoint, *, keep_previous: bool = False) -> None:
        """Replace the checkpoint, atomically, after the log of its steps is on the disk."""
        log = self.path / LOG
        if log.exists():
            with log.open("ab") as file:
                os.fsync(file.fileno())
        names = ("direction", "exp_avg", "exp_avg_sq", *(() if checkpoint.best is None else ("best",)))
        tensors = {name: getattr(checkpoint, name) for name in names}
        metadata = {
            "step": str(checkpoint.step),
            "round": str(checkpoint.round),
            "company": checkpoint.company,
            "identity": json.dumps(self.identity, sort_keys=True),
        }
        if keep_previous and (self.path / CHECKPOINT).exists():
            (self.path / CHECKPOINT).replace(self.path / PREVIOUS)
        write_tensors(self.path / CHECKPOINT, tensors, metadata)

    def start_log(self, last_step: int) -> list[StepRecord]:
        """Cut the log behind `last_step` and return what is left of it."""
        records = [record for record in self.read_log() if record.step <= last_step]
        write_text(self.path / LOG, "".join(record.to_line() for record in records))
        return records

    def read_log(self) -> list[StepRecord]:
        """The log up to a line torn by an interruption, if there is one: what follows it is done again."""
        log, records = self.path / LOG, []
        if log.exists():
            for line in log.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(StepRecord.from_line(line))
                except (ValueError, KeyError, TypeError):
                    break
        return records

    def append(self, record: StepRecord) -> None:
        """Add a line to the log."""
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(record.to_line())
        except OSError as error:
            raise StorageError(
                f"{self.path / LOG}: cannot be written ({error.strerror}); resume the run later."
            ) from error

    def clear(self) -> None:
        """Delete what a complete run has no more use for: cached activations and the checkpoint before the last."""
        (self.path / PREVIOUS).unlink(missing_ok=True)
        shutil.rmtree(self.path / ACTIVATIONS, ignore_errors=True)  # Windows keeps what is open

    @property
    def is_complete(self) -> bool:
        """Whether the run there has ended with an artifact."""
        return (self.path / ARTIFACT_CONFIG).is_file()

    def _read_checkpoint(self, name: str) -> Checkpoint:
        from safetensors import safe_open

        path = self.path / name
        tensors = read_tensors(path)
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        try:
            identity, step = json.loads(metadata["identity"]), int(metadata["step"])
            round_, company = int(metadata["round"]), metadata["company"]
            state = (tensors["direction"], tensors["exp_avg"], tensors["exp_avg_sq"])
            checkpoint = Checkpoint(step, *state, round_, company, tensors.get("best"))
        except (KeyError, ValueError) as error:
            raise StorageError(
                expected_got(str(path), "a checkpoint of this program", f"one without {error}")
            ) from error
        own = json.loads(json.dumps(self.identity))
        different = [name for name in sorted({*own, *identity}) if own.get(name) != identity.get(name)]
        if different:
            changes = "; ".join(f"{name} {identity.get(name)!r} -> {own.get(name)!r}" for name in different)
            remedy = "Resume with the settings it was started with, or choose another output folder."
            raise InvalidInputError(expected_got(f"resuming {self.path}", "the same run", changes, remedy))
        return checkpoint


def common_round(found: Mapping[int, Sequence[Checkpoint]], company: str) -> tuple[int, dict[int, Checkpoint]]:
    """The last round of which all concepts that have begun hold a checkpoint, and those checkpoints.

    Without one, as when a run is resumed with other concepts beside, each goes on from its newest checkpoint; products
    may then round otherwise than in the run that was interrupted.

    Args:
        found: the checkpoints of each concept, the newest first; none of those that have not begun.
        company: of the run that goes on.
    """
    begun = {concept_id: checkpoints for concept_id, checkpoints in found.items() if checkpoints}
    rounds = [{each.round for each in checkpoints if each.company == company} for checkpoints in begun.values()]
    common = set.intersection(*rounds) if rounds else {0}
    if not common:
        return 0, {concept_id: checkpoints[0] for concept_id, checkpoints in begun.items()}
    last = max(common)
    states = {
        concept_id: next(each for each in checkpoints if each.round == last)
        for concept_id, checkpoints in begun.items()
    }
    return last, states
