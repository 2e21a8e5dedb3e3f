"""One concept from its pairs to its artifact, and what the concepts of a run have in common."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.distributed.zero3 import ZeroEngine
from cdas_fast.environment import versions
from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.models.layer_weights import LayerWeights
from cdas_fast.models.packed import Runner, make_runner
from cdas_fast.models.skeleton import drop_embedding, layer_weights
from cdas_fast.models.structure import Decoder, model_fingerprint
from cdas_fast.steering.vector import Factors, SteeringVector
from cdas_fast.storage import sha256_of
from cdas_fast.training.activation_store import ActivationStore
from cdas_fast.training.cache import ActivationCache, build_cache, cache_identity, fill_store, rows_prefix
from cdas_fast.training.concept import ConceptTraining
from cdas_fast.training.config import TrainingConfig
from cdas_fast.training.directions import (
    difference_in_means,
    is_orthonormal,
    orthonormalize,
    principal_direction,
    random_direction,
)
from cdas_fast.training.layer_order import LayerOrderPass
from cdas_fast.training.objective import DivergenceObjective
from cdas_fast.training.run_folder import ACTIVATIONS, Checkpoint, RunFolder, StepRecord
from cdas_fast.training.sequences import cached_sequences, check_pass, merged_passes


@dataclass(frozen=True)
class ConceptResult:
    """Outcome of training one concept."""

    vector: SteeringVector
    history: tuple[StepRecord, ...]
    output_dir: Path | None
    cache_seconds: float = 0.0
    training_seconds: float = 0.0  # its share of the steps, in proportion to tokens
    initial_direction: Tensor | None = None  # (R, D); None if the run had ended before this one resumed it
    positive_projections: Tensor | None = None  # (pairs, layers, R): W h_source of the positive prompts; likewise
    negative_projections: Tensor | None = None  # (pairs, layers, R)
    cache: ActivationCache | None = field(default=None, repr=False)  # of a run over a single concept
    held_out_cache: ActivationCache | None = field(default=None, repr=False)  # likewise

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(record.seconds for record in self.history)


class RunContext:
    """What all concepts of a run share: the model, the template, the settings, and the passes behind one prefix."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        config: TrainingConfig,
        activations_dir: Path | None,
        progress: bool,
        group: ProcessGroup | None = None,
        partition: bool = False,
    ) -> None:
        self.decoder, self.config, self.progress, self.group = decoder, config, progress, group
        self.partition = partition
        self.activations_dir = activations_dir
        self.format = PromptFormat(tokenizer, config.system_prompt, config.source_tokens, config.clean_spaces)
        self.prefix_length = self.format.prefix_length if config.prefix_length is None else config.prefix_length
        self.fingerprint = model_fingerprint(decoder.model)
        self.prefix_ids: tuple[int, ...] = ()
        self.cache_seconds = 0.0  # of the pass over all concepts, if there was one

    def tokenize(self, pairs: ContrastivePairs) -> TokenRows:
        """The rows of the pairs."""
        return tokenize_pairs(
            pairs,
            self.format,
            directions=self.config.directions,
            max_output_tokens=self.config.max_output_tokens,
            context_length=self.decoder.context_length,
        )

    @functools.cached_property
    def runner(self) -> Runner:
        """For passes behind `prefix_ids`, to be set before."""
        return make_runner(self.decoder, self.prefix_ids, self.config.packing, self.config.impl)

    def store_in(self, folder: Path) -> ActivationStore:
        """The store of this run's activations in a folder of stores."""
        model = self.decoder.model
        revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        name = getattr(model, "name_or_path", None) or None
        identity = cache_identity(self.runner, self.config.layers, self.config.impl, name=name, revision=revision)
        return ActivationStore(folder, identity)

    @functools.cached_property
    def kept_store(self) -> ActivationStore | None:
        """The store that outlives the run, if there is to be one."""
        return None if self.activations_dir is None else self.store_in(self.activations_dir)

    @property
    def weights(self) -> LayerWeights | None:
        """The linear weights of a model whose layers do not hold theirs."""
        return layer_weights(self.decoder.model)

    def cache_in_layer_order(self, concepts: Iterable[ConceptRun], *, check: bool) -> None:
        """Compute what is missing of the activations of all concepts, in one pass that reads each weight once.

        With `check`, also what the suffix of the first one is compared with.
        """
        weights, store = self.weights, self.kept_store
        assert weights is not None
        assert store is not None
        shared = len(self.prefix_ids)
        sets = [
            cached_sequences(self.tokenize(pairs), self.config.layers, shared)
            for concept in concepts
            for pairs in (concept.pairs, concept.held_out)
            if pairs is not None
        ]
        if not sets:
            return
        started, resident = time.perf_counter(), weights.resident
        weights.keep(())  # those that training needs would only be in the way
        checks = [check_pass(sets[0], shared)] if check else []
        LayerOrderPass(
            self.runner,
            weights,
            [*merged_passes(sets), *checks],
            store,
            store.path.with_suffix(".scratch"),
            micro_batch_tokens=self.config.micro_batch_tokens,
            memory_bytes=self.config.cache_bytes,
            processes=None if self.group is None else self.group.processes,
            progress=self.progress,
        ).run()
        drop_embedding(self.decoder.model)
        weights.keep(resident)
        if self.group is not None:
            self.group.wait()
        self.cache_seconds = time.perf_counter() - started

    def cache_own_share(self, concepts: Iterable[ConceptRun]) -> None:
        """Compute this process's share of the activations of all concepts, and wait for the others'."""
        group, store, shared = self.group, self.kept_store, len(self.prefix_ids)
        assert group is not None
        if store is not None:
            started = time.perf_counter()
            sets = [
                cached_sequences(self.tokenize(pairs), self.config.layers, shared)
                for concept in concepts
                for pairs in (concept.pairs, concept.held_out)
                if pairs is not None
            ]
            for one in sets:
                fill_store(one, self.runner, store, self.config.micro_batch_tokens, group.processes, self.progress)
            self.cache_seconds = time.perf_counter() - started
        group.wait()

    @functools.cached_property
    def objective(self) -> DivergenceObjective:
        """The loss of the rows of any concept."""
        return DivergenceObjective(
            self.decoder,
            self.runner,
            self.config.layers,
            prefix_length=self.prefix_length,
            beta=self.config.beta,
            micro_batch_tokens=self.config.micro_batch_tokens,
            recompute=self.config.recompute,
            activation_bytes=self.config.activation_bytes,
            offload=self.config.offload_activations,
            impl=self.config.impl,
            engine=self.engine,
        )

    @functools.cached_property
    def engine(self) -> ZeroEngine | None:
        """What partitions the weights that training needs, if that is asked for."""
        if not self.partition or self.group is None:
            return None
        return ZeroEngine(self.decoder, self.runner, self.config.layers[0], self.group)

    def close(self) -> None:
        """Let the model be what it was."""
        engine = self.__dict__.pop("engine", None)
        if engine is not None:
            engine.close()


class ConceptRun:
    """One concept: its pairs are checked at once, its activations computed when it starts and let go when it ends."""

    def __init__(
        self,
        context: RunContext,
        concept_id: int,
        pairs: ContrastivePairs,
        held_out: ContrastivePairs | None,
        folder: Path | None,
    ) -> None:
        self.context, self.concept_id, self.pairs, self.held_out = context, concept_id, pairs, held_out
        config = context.config
        rows = context.tokenize(pairs)
        self.template_sha256 = rows.template_sha256
        self.prefix_ids = rows_prefix([rows], context.prefix_length)
        if held_out is not None:
            held_out_prefix = rows_prefix([context.tokenize(held_out)], context.prefix_length)
            self.prefix_ids = agreed_prefix([self.prefix_ids, held_out_prefix])
        self.steps_per_epoch = -(-len(pairs) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.base_tokens = sum(len(row.base.ids) for row in rows.rows)
        self.sequences = len(rows.rows)
        identity = {
            **config.identity(),
            "model": context.fingerprint,
            "template": rows.template_sha256,
            "data": rows.sha256,
        }
        self.identity_sha256 = sha256_of(json.dumps(identity, sort_keys=True))
        self.folder = None if folder is None else RunFolder(folder, identity)
        self._writes = context.group is None or context.group.is_first
        self.training: ConceptTraining | None = None

    @property
    def is_complete(self) -> bool:
        """Whether its folder holds the artifact."""
        return self.folder is not None and self.folder.is_complete

    @property
    def tokens_per_step(self) -> float:
        """Base tokens beyond the shared prefix, on average."""
        beyond = self.base_tokens - self.sequences * len(self.context.prefix_ids)
        return beyond / self.steps_per_epoch

    def prepare(self, resume: bool) -> tuple[Checkpoint, ...]:
        """Make the folder, or find the checkpoints to go on from, the newest first."""
        return () if self.folder is None else self.folder.prepare(resume)

    def start(self, checkpoint: Checkpoint | None, round_: int, together: int) -> None:
        """Compute the activations; `together` concepts divide the memory for them."""
        context, config = self.context, self.context.config
        started = time.perf_counter()
        store = context.kept_store
        if store is None and self.folder is not None:
            store = context.store_in(self.folder.path / ACTIVATIONS)

        def cached(pairs: ContrastivePairs, description: str) -> ActivationCache:
            return build_cache(
                context.decoder,
                context.tokenize(pairs),
                config.layers,
                prefix_length=context.prefix_length,
                runner=context.runner,
                impl=config.impl,
                micro_batch_tokens=config.micro_batch_tokens,
                store=store,
                memory_bytes=config.cache_bytes // together,
                description=description,
                progress=context.progress,
            )

        cache = cached(self.pairs, "Caching activations")
        held_out = None if self.held_out is None else cached(self.held_out, "Caching held-out activations")
        self.cache_seconds = time.perf_counter() - started + context.cache_seconds
        self.initial = self._initial_direction(cache)
        self.first_step = 0 if checkpoint is None else checkpoint.step
        self._round_before = round_ - self.first_step  # of its first step
        self._saved_step = -1
        self.training = ConceptTraining(
            self.concept_id,
            cache,
            config,
            self.initial,
            held_out=held_out,
            checkpoint=checkpoint,
            records=self._start_log(),
        )

    @property
    def is_finished(self) -> bool:
        """Whether its steps are done."""
        return self.training is not None and self.training.is_finished

    def _start_log(self) -> list[StepRecord]:
        """The log of the steps that are done."""
        folder, group = self.folder, self.context.group
        if folder is None:
            return []
        if group is None:
            return folder.start_log(self.first_step)
        group.first(lambda: folder.start_log(self.first_step))
        return [record for record in folder.read_log() if record.step <= self.first_step]

    def log(self, record: StepRecord) -> None:
        """Add a line to the log."""
        if self.folder is not None and self._writes:
            self.folder.append(record)

    def save(self, company: str, *, together: bool) -> None:
        """Write a checkpoint, unless there is one of this state; of concepts that train together keep the last two."""
        assert self.training is not None
        state = self.training.state
        if self.folder is not None and self._saved_step != state.step:
            state = dataclasses.replace(state, round=self._round_before + state.step, company=company)
            if self._writes:
                self.folder.save(state, keep_previous=together)
            self._saved_step = state.step

    def finish(self, keep_caches: bool) -> ConceptResult:
        """Write report and artifact, and let the activations go."""
        training = self.training
        assert training is not None
        direction, cache = training.result.clone(), training.cache  # where it lies in memory bears on rounding
        projections = [sources.float() @ direction.T for sources in (cache.positive_sources, cache.negative_sources)]
        vector = self._vector(direction, *map(Factors.from_projections, projections))
        result = ConceptResult(
            vector=vector,
            history=tuple(training.records),
            output_dir=None if self.folder is None else self.folder.path,
            cache_seconds=self.cache_seconds,
            training_seconds=sum(record.seconds for record in training.records[self.first_step :]),
            initial_direction=self.initial,
            positive_projections=projections[0],
            negative_projections=projections[1],
            cache=cache if keep_caches else None,
            held_out_cache=training.held_out if keep_caches else None,
        )
        self.training = None
        if self.folder is not None and self._writes:
            from cdas_fast.training.summary import write_run_report

            write_run_report(self.folder.path, result)
            vector.save_pretrained(self.folder.path, overwrite=True)  # a killed run may have left a part of it
            self.folder.clear()
        return result

    def stored_result(self) -> ConceptResult:
        """What a run that had ended left in the folder."""
        assert self.folder is not None
        vector = SteeringVector.from_pretrained(self.folder.path)
        return ConceptResult(vector, tuple(self.folder.read_log()), self.folder.path)

    def _initial_direction(self, cache: ActivationCache) -> Tensor:
        config, width = self.context.config, self.context.decoder.hidden_size
        if config.rank > width:
            raise InvalidInputError(expected_got("rank", f"at most the model's width {width}", config.rank))
        match config.initial_direction:
            case Tensor() as given:
                if tuple(given.shape) != (config.rank, width):
                    wanted = f"shape ({config.rank}, {width}), that is (rank, width)"
                    raise InvalidInputError(expected_got("initial_direction", wanted, f"shape {tuple(given.shape)}"))
                given = given.detach().to("cpu", torch.float32)
                return given.clone() if is_orthonormal(given) else orthonormalize(given)
            case "difference-in-means":
                return difference_in_means(cache.positive_sources, cache.negative_sources, config.rank, config.seed)
            case "principal-direction":
                return principal_direction(cache.positive_sources, cache.negative_sources, config.rank)
            case _:
                return random_direction(config.rank, width, config.seed)

    def _vector(self, direction: Tensor, positive: Factors, negative: Factors) -> SteeringVector:
        context, decoder = self.context, self.context.decoder
        model_config = getattr(decoder.model, "config", None)
        return SteeringVector(
            direction=direction,
            layers=context.config.layers,
            hidden_size=decoder.hidden_size,
            num_layers=decoder.num_layers,
            prefix_length=context.prefix_length,
            positive=positive,
            negative=negative,
            base_model=getattr(decoder.model, "name_or_path", None) or None,
            revision=getattr(model_config, "_commit_hash", None),
            template_sha256=self.template_sha256,
            system_prompt=context.config.system_prompt,
            concept=self.pairs[0].concept,
            metadata={
                "settings": context.config.to_dict(),
                "pairs": len(self.pairs),
                "data_sha256": self.pairs.sha256,
                "model_sha256": context.fingerprint,
                "versions": versions(),
            },
        )


def agreed_prefix(prefixes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What all begin with; nothing if there are none."""
    first, *others = prefixes or [()]
    length = len(first)
    for other in others:
        same = (place for place, (one, its) in enumerate(zip(first[:length], other, strict=False)) if one != its)
        length = next(same, min(length, len(other)))
    return tuple(first[:length])
