"""Training: contrastive pairs in, steering vectors out, several concepts at a time."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.distributed.processes import Processes
from cdas_fast.distributed.zero3 import partitionable, require_deepspeed
from cdas_fast.errors import InvalidInputError, NonFiniteError, expected_got
from cdas_fast.models.layer_weights import spread
from cdas_fast.models.loading import load_model
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import frozen, inspect_decoder
from cdas_fast.steering.vector import SteeringVector
from cdas_fast.storage import sha256_of
from cdas_fast.training.concept import StepInfo, step_together
from cdas_fast.training.concept_run import ConceptResult, ConceptRun, RunContext, agreed_prefix
from cdas_fast.training.config import TrainingConfig
from cdas_fast.training.run_folder import (
    ACTIVATIONS,
    ARTIFACT_CONFIG,
    Checkpoint,
    StepRecord,
    common_round,
    refuse_used_folder,
)


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a run over one or several concepts."""

    concepts: Mapping[int, ConceptResult]
    peak_memory_bytes: int  # of the device for CUDA, else of the process
    failed: Mapping[int, NonFiniteError] = field(default_factory=dict)  # of several concepts

    @property
    def only(self) -> ConceptResult:
        """The result of a run over a single concept."""
        if len(self.concepts) != 1:
            remedy = "Use result.concepts[concept_id]."
            raise InvalidInputError(expected_got("result", "one concept", f"{list(self.concepts)}", remedy))
        return next(iter(self.concepts.values()))

    @property
    def vector(self) -> SteeringVector:
        """The vector of a run over a single concept."""
        return self.only.vector

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """The steps of a run over a single concept."""
        return self.only.history


def train(
    model: nn.Module | str | os.PathLike[str],
    tokenizer: Any,
    pairs: Any,
    config: TrainingConfig,
    *,
    validation: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    activations_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool = True,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    load_in_4bit: bool = False,
    resident_layers: int | None = None,
    processes: Processes | None = None,
    group: ProcessGroup | None = None,
    deepspeed: bool = False,
) -> TrainingResult:
    """Learn a direction along which an interchange makes the model answer as it does to the counterfactual prompt.

    For a pair (x, y, x^c, y^c) and the direction w of unit length, with Phi(h; a) = h + (a - w.h) w and a = w.h_source:

        D+ = mean_k JSD( p_Phi(. | x,   y^c_<k; a from x^c) || p(. | x^c, y^c_<k) )
        D- = mean_k JSD( p_Phi(. | x^c, y_<k;   a from x  ) || p(. | x,   y_<k  ) )

    The mean of both over the pairs is minimised by AdamW, the model being frozen. Its activations up to the layer, and
    the target's final hidden states, are computed once.

    Several concepts share the micro-batches, each with its own direction, optimiser state, clipping and schedule: the
    gradients are those that it has alone. `concepts_together` of them are at work at a time; when one has finished, the
    next one's activations are computed.

    Args:
        model: a Hugging Face causal language model, or the name of one (see `load_model`). It is left as it was.
        tokenizer: its tokenizer; that of the named model if None.
        pairs: `ContrastivePairs`, or what they can be made of: a file, a table, a `datasets.Dataset`, records.
        config: the settings.
        validation: held-out pairs, on which the loss is measured every `evaluate_every` epochs.
        output_dir: folder for log, checkpoints, vector and report, new or empty; a sub-folder `concept_ID` for each of
            several concepts. Nothing is written if None.
        activations_dir: folder in which activations are kept for later runs, which find those of the same model, layers
            and sequences again, whatever their other settings. If None, they lie in `output_dir` until the run is
            complete, so that an interrupted one need not compute them again; without either, see `cache_bytes`.
        resume: go on in `output_dir` where an interrupted run with the same settings stopped. On a CPU the result is
            the same to the bit as without the interruption.
        callback: called after each step of each concept.
        progress: whether to show progress bars (never if the standard error is no terminal).
        dtype: of a model given by name.
        device: of a model given by name.
        load_in_4bit: of a model given by name, see `load_model`.
        resident_layers: of a model given by name, how many of the layers beyond the intervened ones stay on the device;
            the others are read twice a step, however many micro-batches it has. All stay if None.
        processes: of several that train the same pairs, which one this is: each takes its share of the concepts.
        group: of processes that divide the rows of each step instead. All get the result, the first one writes it; all
            of them have to see `output_dir` and `activations_dir`.
        deepspeed: each process of the group keeps its part of the weights of the layers beyond the intervened ones and
            of the head alone, by ZeRO-3; the model is then read in parts, as with `load_in_4bit`, in 4 bits or not.

    Returns:
        The vectors with their factors, and the history of the run.

    Raises:
        InvalidInputError: pairs, settings or folder that are not as they have to be.
        MissingDependencyError: `deepspeed` without the package.
        UnsupportedError: a model that is not a plain decoder.
        NonFiniteError: a NaN or an infinity; the row and the step are named and the last good state is kept. Of several
            concepts the others go on, and the error is in `TrainingResult.failed`.
        ProcessGroupError: another process of the group has ended, does not answer, or has other settings.
        StorageError: the folder cannot be written.

    Source: the published Concept DAS implementation; see the README for the citation.
    """
    pairs = ContrastivePairs.from_any(pairs).select(max_examples=config.max_examples)
    held_out = None if validation is None else ContrastivePairs.from_any(validation)
    if resume and output_dir is None:
        raise InvalidInputError(expected_got("resume", "an output_dir to resume in", "none"))
    if group is not None and output_dir is None:
        raise InvalidInputError(expected_got("output_dir", "a folder that all processes of the group see", "none"))
    if deepspeed:
        require_deepspeed()
        if group is None:
            raise InvalidInputError(expected_got("group", "processes that the weights are divided among", "none"))
        if resident_layers is not None:
            wanted = "none, with deepspeed: all layers are divided"
            raise InvalidInputError(expected_got("resident_layers", wanted, resident_layers))
        resident_layers = None if isinstance(model, nn.Module) else 0
    if config.patience is not None:
        measured = () if held_out is None else held_out.concept_ids
        if without := [concept_id for concept_id in pairs.concept_ids if concept_id not in measured]:
            wanted = "held-out pairs of every concept, as patience needs them"
            remedy = "Give such pairs, or leave patience out."
            raise InvalidInputError(expected_got("validation", wanted, f"none of concept {without[0]}", remedy))
    several = len(pairs.concept_ids) > 1
    counts = Counter(pair.concept_id for pair in pairs)
    sizes = {concept_id: counts[concept_id] for concept_id in pairs.concept_ids}
    own = list(sizes) if processes is None else processes.share(sizes)
    folders: dict[int, Path | None] = dict.fromkeys(own)
    all_folders: list[Path] = []
    if output_dir is not None:
        of_all = {each: Path(output_dir) / f"concept_{each}" if several else Path(output_dir) for each in sizes}
        folders, all_folders = {each: of_all[each] for each in own}, [*of_all.values()]
        if not resume:

            def refuse_used() -> None:
                others = processes is not None and processes.count > 1  # that may have begun in theirs
                for folder in folders.values() if others else [output_dir]:
                    refuse_used_folder(folder)  # type: ignore[arg-type]

            refuse_used() if group is None else group.first(refuse_used)
    model, tokenizer = load_model(
        model, tokenizer, dtype=dtype, device=device, load_in_4bit=load_in_4bit, resident_layers=resident_layers
    )
    if deepspeed:
        partitionable(model)
    decoder = inspect_decoder(model)
    for layer in config.layers:
        decoder.layer_index(layer)
    if decoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(decoder.device)
    at_once = group is not None or layer_weights(model) is not None
    kept = _activations_folder(at_once, output_dir, activations_dir, all_folders)
    with frozen(model), kept as activations, _suffix_kept(model, config, deepspeed), ExitStack() as stack:
        context = RunContext(decoder, tokenizer, config, activations, progress, group, partition=deepspeed)
        stack.callback(context.close)
        concepts = []
        quiet = None if progress and several else True
        for concept_id in tqdm(own, desc="Reading pairs", unit="concept", leave=False, disable=quiet):
            its_held_out = None
            if held_out is not None and concept_id in held_out.concept_ids:
                its_held_out = held_out.of_concept(concept_id)
            its_pairs, folder = pairs.of_concept(concept_id), folders[concept_id]
            concepts.append(ConceptRun(context, concept_id, its_pairs, its_held_out, folder))
        context.prefix_ids = agreed_prefix([concept.prefix_ids for concept in concepts])
        if group is not None:
            group.agree("run", sha256_of(*(concept.identity_sha256 for concept in concepts)))
        schedule = _Schedule(context, concepts)
        schedule.run(resume, callback)
        if group is not None:
            group.wait()  # before anything is deleted that another one may read
    results, failed = schedule.results, schedule.failed
    if failed and not several:
        raise next(iter(failed.values()))
    in_order = {concept_id: results[concept_id] for concept_id in own if concept_id in results}
    return TrainingResult(in_order, peak_memory_bytes(decoder.device), failed)


@contextmanager
def _activations_folder(
    at_once: bool,
    output_dir: str | os.PathLike[str] | None,
    given: str | os.PathLike[str] | None,
    folders: Iterable[Path],
) -> Iterator[Path | None]:
    """The folder given; else one for all concepts of the run, if their activations are computed at once.

    None if each concept is to have a folder of its own, among `folders`.
    """
    if given is not None or not at_once:
        yield None if given is None else Path(given)
        return
    if output_dir is None:
        with tempfile.TemporaryDirectory(prefix="cdas-fast-") as folder:
            yield Path(folder)
        return
    folder_of_run = Path(output_dir) / ACTIVATIONS
    yield folder_of_run  # upon an error it stays: a later run goes on with it
    if all((folder / ARTIFACT_CONFIG).is_file() for folder in folders):  # other processes may be at work
        shutil.rmtree(folder_of_run, ignore_errors=True)  # Windows keeps what is open


@contextmanager
def _suffix_kept(model: nn.Module, config: TrainingConfig, partition: bool) -> Iterator[None]:
    """Let the layers that stay on the device be some of those that training needs; none if it partitions them."""
    weights = layer_weights(model)
    if weights is None:
        yield
        return
    before = weights.resident
    needed = range(config.layers[0] + 1, weights.count)
    if partition:
        weights.keep(())
    else:
        weights.keep(needed if len(before) == weights.count else spread(needed, len(before)))
    try:
        yield
    finally:
        weights.keep(before)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated by torch on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Schedule:
    """Which concepts take the next step: the first ones of those that have not finished, in the order of the pairs.

    The rows of a step share micro-batches, so that what a product rounds to may depend on who is in it. Therefore the
    concepts keep in step: a checkpoint says in which round it was written, and a resumed run goes on from the last
    round of which all have one.
    """

    def __init__(self, context: RunContext, concepts: Sequence[ConceptRun]) -> None:
        self.context, self.concepts = context, concepts
        self.limit = _together(context.config, concepts)
        self.company = sha256_of(*(str(concept.concept_id) for concept in concepts), str(self.limit))[:16]
        self.results: dict[int, ConceptResult] = {}
        self.failed: dict[int, NonFiniteError] = {}
        self.active: list[ConceptRun] = []
        self.round = 0

    def run(self, resume: bool, callback: Callable[[StepInfo], None] | None) -> None:
        """Train all concepts."""
        found = self._prepared(resume)
        for concept in self.concepts:
            if concept.is_complete:
                self.results[concept.concept_id] = concept.stored_result()
                del found[concept.concept_id]
        self.round, states = common_round(found, self.company)
        pending = deque(concept for concept in self.concepts if not concept.is_complete)
        if self.context.weights is not None:
            # a concept that is complete was checked when it was cached: no reason to read all layers again
            self.context.cache_in_layer_order(pending, check=not self.results)
        elif self.context.group is not None:
            self.context.cache_own_share(pending)
        bar = tqdm(
            total=sum(concept.total_steps for concept in pending),
            initial=sum(state.step for state in states.values()),
            desc="Training",
            unit="step",
            disable=None if self.context.progress else True,
        )
        try:
            with bar:
                while pending or self.active:
                    self._admit(pending, states)
                    if self._end_finished() or not self.active:
                        continue  # there is room for others
                    infos = self._step()
                    for info in infos:
                        if callback is not None:
                            callback(info)
                    bar.update(len(infos))
                    if infos:
                        bar.set_postfix(self._progress(infos), refresh=False)
        finally:
            for concept in self.active:  # interrupted: keep the last whole step
                concept.save(self.company, together=self.limit > 1)

    def _prepared(self, resume: bool) -> dict[int, tuple[Checkpoint, ...]]:
        """The checkpoints of each concept."""

        def prepare() -> dict[int, tuple[Checkpoint, ...]]:
            return {concept.concept_id: concept.prepare(resume) for concept in self.concepts}

        group = self.context.group
        if group is None:
            return prepare()
        first = group.first(prepare)  # who deletes scraps
        found = prepare() if first is None and resume else first or {each.concept_id: () for each in self.concepts}
        group.agree("checkpoints", str({each: [state.step for state in states] for each, states in found.items()}))
        return found

    def _admit(self, pending: deque[ConceptRun], states: Mapping[int, Checkpoint]) -> None:
        while pending and len(self.active) < self.limit:
            concept = pending.popleft()
            try:
                concept.start(states.get(concept.concept_id), self.round, self.limit)
            except NonFiniteError as error:
                self.failed[concept.concept_id] = error
                continue
            self.active.append(concept)
            concept.save(self.company, together=self.limit > 1)

    def _step(self) -> list[StepInfo]:
        """A step of each active concept."""
        infos = []
        training = [concept.training for concept in self.active if concept.training is not None]
        outcomes = step_together(self.context.objective, training, self.context.group)
        self.round += 1
        for concept, outcome in zip(list(self.active), outcomes, strict=True):
            if isinstance(outcome, NonFiniteError):
                concept.save(self.company, together=self.limit > 1)
                self.active.remove(concept)
                self.failed[concept.concept_id] = outcome
            else:
                concept.log(outcome.record)
                infos.append(outcome)
        if self.round % self.context.config.checkpoint_every == 0 or any(each.is_finished for each in self.active):
            for concept in self.active:
                concept.save(self.company, together=self.limit > 1)
        return infos

    def _end_finished(self) -> bool:
        finished = [concept for concept in self.active if concept.is_finished]
        for concept in finished:
            self.results[concept.concept_id] = concept.finish(keep_caches=len(self.concepts) == 1)
            self.active.remove(concept)
        return bool(finished)

    def _progress(self, infos: Sequence[StepInfo]) -> dict[str, str]:
        shown = {"loss": f"{sum(info.record.loss for info in infos) / len(infos):.4f}"}
        if len(self.concepts) > 1:
            shown["concepts"] = f"{len(self.results)}/{len(self.concepts)}"
        return shown


def _together(config: TrainingConfig, concepts: Sequence[ConceptRun]) -> int:
    """How many concepts train at a time: as many as fill a micro-batch, if the settings do not say."""
    if config.concepts_together is not None:
        return config.concepts_together
    tokens = sum(concept.tokens_per_step for concept in concepts) / max(1, len(concepts))
    return max(1, min(len(concepts), int(config.micro_batch_tokens // max(1.0, tokens))))
