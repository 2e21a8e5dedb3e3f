"""The training loop: pairs in, steering vector out."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.data.prompts import PromptFormat
from cdas_fast.data.rows import TokenRows, tokenize_pairs
from cdas_fast.environment import versions
from cdas_fast.errors import InvalidInputError, NonFiniteError, expected_got
from cdas_fast.models.loading import load_model
from cdas_fast.models.structure import Decoder, frozen, inspect_decoder, model_fingerprint
from cdas_fast.steering.vector import Factors, SteeringVector
from cdas_fast.training.cache import ActivationCache, build_cache
from cdas_fast.training.config import TrainingConfig
from cdas_fast.training.directions import difference_in_means, is_orthonormal, orthonormalize, random_direction
from cdas_fast.training.objective import DivergenceObjective, interchange_with
from cdas_fast.training.run_folder import Checkpoint, RunFolder, StepRecord, refuse_used_folder


@dataclass(frozen=True)
class StepInfo:
    """What a callback is given after each step."""

    record: StepRecord
    gradient: Tensor  # (R, D), before clipping
    direction: Tensor  # (R, D), after the step


@dataclass(frozen=True)
class ConceptResult:
    """Outcome of training one concept."""

    vector: SteeringVector
    history: tuple[StepRecord, ...]
    initial_direction: Tensor  # (R, D)
    positive_projections: Tensor  # (pairs, layers, R): W h_source of the positive prompts
    negative_projections: Tensor  # (pairs, layers, R)
    cache: ActivationCache = field(repr=False)
    held_out_cache: ActivationCache | None = field(repr=False)
    cache_seconds: float
    training_seconds: float
    output_dir: Path | None

    @property
    def step_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(record.seconds for record in self.history)


@dataclass(frozen=True)
class TrainingResult:
    """Outcome of a run over one or several concepts."""

    concepts: Mapping[int, ConceptResult]
    peak_memory_bytes: int  # of the device for CUDA, else of the process

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
    resume: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool = True,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> TrainingResult:
    """Learn a direction along which an interchange makes the model answer as it does to the counterfactual prompt.

    For a pair (x, y, x^c, y^c) and the direction w of unit length, with Phi(h; a) = h + (a - w.h) w and a = w.h_source:

        D+ = mean_k JSD( p_Phi(. | x,   y^c_<k; a from x^c) || p(. | x^c, y^c_<k) )
        D- = mean_k JSD( p_Phi(. | x^c, y_<k;   a from x  ) || p(. | x,   y_<k  ) )

    The mean of both over the pairs is minimised by AdamW, the model being frozen. Its activations up to the layer, and
    the target's final hidden states, are computed once.

    Args:
        model: a Hugging Face causal language model, or the name of one (see `load_model`). It is left as it was.
        tokenizer: its tokenizer; that of the named model if None.
        pairs: `ContrastivePairs`, or what they can be made of: a file, a table, a `datasets.Dataset`, records.
        config: the settings.
        validation: held-out pairs, on which the loss is measured every `evaluate_every` epochs.
        output_dir: folder for log, checkpoints, vector and report, new or empty; a sub-folder `concept_ID` for each of
            several concepts. Nothing is written if None.
        resume: go on in `output_dir` where an interrupted run with the same settings stopped. On a CPU the result is
            the same to the bit as without the interruption.
        callback: called after each step.
        progress: whether to show progress bars (never if the standard error is no terminal).
        dtype: of a model given by name.
        device: of a model given by name.

    Returns:
        The vectors with their factors, and the history of the run.

    Raises:
        InvalidInputError: pairs, settings or folder that are not as they have to be.
        UnsupportedError: a model that is not a plain decoder.
        NonFiniteError: a NaN or an infinity; the row and the step are named and the last good state is kept.
        StorageError: the folder cannot be written.

    Source: the published Concept DAS implementation; see the README for the citation.
    """
    pairs = ContrastivePairs.from_any(pairs).select(max_examples=config.max_examples)
    held_out = None if validation is None else ContrastivePairs.from_any(validation)
    if resume and output_dir is None:
        raise InvalidInputError(expected_got("resume", "an output_dir to resume in", "none"))
    if output_dir is not None and not resume:
        refuse_used_folder(output_dir)
    model, tokenizer = load_model(model, tokenizer, dtype=dtype, device=device)
    decoder = inspect_decoder(model)
    for layer in config.layers:
        decoder.layer_index(layer)
    if decoder.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(decoder.device)
    fingerprint = model_fingerprint(model)
    results = {}
    concept_ids = pairs.concept_ids
    for concept_id in concept_ids:
        folder = None
        if output_dir is not None:
            folder = Path(output_dir) if len(concept_ids) == 1 else Path(output_dir) / f"concept_{concept_id}"
        with frozen(model):
            run = _Run(decoder, tokenizer, pairs.of_concept(concept_id), config, fingerprint, folder, progress)
            own_held_out = None
            if held_out is not None and concept_id in held_out.concept_ids:
                own_held_out = held_out.of_concept(concept_id)
            results[concept_id] = run(own_held_out, resume, callback)
    return TrainingResult(results, peak_memory_bytes(decoder.device))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: allocated by torch on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Run:
    """One concept's run."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Any,
        pairs: ContrastivePairs,
        config: TrainingConfig,
        fingerprint: str,
        folder: Path | None,
        progress: bool,
    ) -> None:
        self.decoder, self.pairs, self.config, self.progress = decoder, pairs, config, progress
        self.format = PromptFormat(tokenizer, config.system_prompt, config.source_tokens, config.clean_spaces)
        self.prefix_length = self.format.prefix_length if config.prefix_length is None else config.prefix_length
        self.rows = self._tokenize(pairs)
        self.fingerprint = fingerprint
        self.identity = {
            **config.identity(),
            "model": fingerprint,
            "template": self.rows.template_sha256,
            "data": self.rows.sha256,
        }
        self.folder = None if folder is None else RunFolder(folder, self.identity)

    def __call__(
        self, held_out: ContrastivePairs | None, resume: bool, callback: Callable[[StepInfo], None] | None
    ) -> ConceptResult:
        checkpoint = self.folder.prepare(resume) if self.folder is not None else None
        started = time.perf_counter()
        cache = self._cache(self.rows, "Caching activations")
        held_out_cache = None
        if held_out is not None:
            held_out_cache = self._cache(self._tokenize(held_out), "Caching held-out activations")
        cache_seconds = time.perf_counter() - started
        initial = self._initial_direction(cache)
        started = time.perf_counter()
        loop = TrainingLoop(
            self.decoder,
            cache,
            self.config,
            initial,
            prefix_length=self.prefix_length,
            held_out_cache=held_out_cache,
            folder=self.folder,
            checkpoint=checkpoint,
            progress=self.progress,
        )
        direction = loop.run(callback)
        training_seconds = time.perf_counter() - started

        projections = [sources.float() @ direction.T for sources in (cache.positive_sources, cache.negative_sources)]
        vector = self._vector(direction, *map(Factors.from_projections, projections))
        result = ConceptResult(
            vector=vector,
            history=tuple(loop.records),
            initial_direction=initial,
            positive_projections=projections[0],
            negative_projections=projections[1],
            cache=cache,
            held_out_cache=held_out_cache,
            cache_seconds=cache_seconds,
            training_seconds=training_seconds,
            output_dir=None if self.folder is None else self.folder.path,
        )
        if self.folder is not None and not self.folder.is_complete:
            from cdas_fast.training.summary import write_run_report

            write_run_report(self.folder.path, result)
            vector.save_pretrained(self.folder.path, overwrite=True)  # a killed run may have left a part of it
        return result

    def _tokenize(self, pairs: ContrastivePairs) -> TokenRows:
        return tokenize_pairs(
            pairs,
            self.format,
            directions=self.config.directions,
            max_output_tokens=self.config.max_output_tokens,
            context_length=self.decoder.context_length,
        )

    def _cache(self, rows: TokenRows, description: str) -> ActivationCache:
        return build_cache(
            self.decoder,
            rows,
            self.config.layers,
            prefix_length=self.prefix_length,
            packing=self.config.packing,
            impl=self.config.impl,
            micro_batch_tokens=self.config.micro_batch_tokens,
            memory_bytes=self.config.cache_bytes,
            folder=None if self.folder is None else self.folder.path,
            description=description,
            progress=self.progress,
        )

    def _initial_direction(self, cache: ActivationCache) -> Tensor:
        config, width = self.config, self.decoder.hidden_size
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
            case _:
                return random_direction(config.rank, width, config.seed)

    def _vector(self, direction: Tensor, positive: Factors, negative: Factors) -> SteeringVector:
        config = getattr(self.decoder.model, "config", None)
        return SteeringVector(
            direction=direction,
            layers=self.config.layers,
            hidden_size=self.decoder.hidden_size,
            num_layers=self.decoder.num_layers,
            prefix_length=self.prefix_length,
            positive=positive,
            negative=negative,
            base_model=getattr(self.decoder.model, "name_or_path", None) or None,
            revision=getattr(config, "_commit_hash", None),
            template_sha256=self.rows.template_sha256,
            system_prompt=self.config.system_prompt,
            concept=self.pairs[0].concept,
            metadata={
                "settings": self.config.to_dict(),
                "pairs": len(self.pairs),
                "data_sha256": self.pairs.sha256,
                "model_sha256": self.fingerprint,
                "versions": versions(),
            },
        )


class TrainingLoop:
    """Steps of AdamW on the direction, with the state that a checkpoint holds.

    Args:
        decoder: the model, frozen.
        cache: its activations on the rows to train on.
        config: the settings.
        initial: the initial direction (R, D), orthonormal.
        prefix_length: positions that are never intervened on.
        held_out_cache: the activations on held-out rows, if their loss is to be measured.
        folder: where log and checkpoints go; nothing is written if None.
        checkpoint: the state to go on from, instead of the initial direction.
        progress: whether to show a progress bar (never if the standard error is no terminal).
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: ActivationCache,
        config: TrainingConfig,
        initial: Tensor,
        *,
        prefix_length: int,
        held_out_cache: ActivationCache | None = None,
        folder: RunFolder | None = None,
        checkpoint: Checkpoint | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.device = decoder.device

        def objective_on(cache: ActivationCache) -> DivergenceObjective:
            return DivergenceObjective(
                decoder,
                cache,
                prefix_length=prefix_length,
                beta=config.beta,
                micro_batch_tokens=config.micro_batch_tokens,
                impl=config.impl,
            )

        self.objective = objective_on(cache)
        self.held_out = None if held_out_cache is None else objective_on(held_out_cache)
        self.rows_per_pair = 2 if self.config.directions == "both" else 1
        self.pairs = len(cache.rows.rows) // self.rows_per_pair
        self.steps_per_epoch = -(-self.pairs // self.config.batch_size)
        self.total_steps = self.config.epochs * self.steps_per_epoch
        self.state = checkpoint or Checkpoint(0, initial, torch.zeros_like(initial), torch.zeros_like(initial))
        self.records = self.folder.start_log(self.state.step) if self.folder is not None else []
        self.direction = self.state.direction.to(self.device).clone().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            [self.direction], lr=self.config.learning_rate, betas=self.config.betas, weight_decay=0.0, foreach=False
        )
        self.optimizer.state[self.direction] = {
            "step": torch.tensor(float(self.state.step)),
            "exp_avg": self.state.exp_avg.to(self.device).clone(),
            "exp_avg_sq": self.state.exp_avg_sq.to(self.device).clone(),
        }

    def run(self, callback: Callable[[StepInfo], None] | None) -> Tensor:
        """Do the steps that are left and return the direction, (R, D) float32 on the CPU."""
        bar = tqdm(
            total=self.total_steps,
            initial=self.state.step,
            desc="Training",
            unit="step",
            disable=None if self.progress else True,
        )
        saved = self.state.step
        try:
            with bar:
                while self.state.step < self.total_steps:
                    info = self.step()
                    if self.folder is not None:
                        self.folder.append(info.record)
                        if self.state.step % self.config.checkpoint_every == 0 or self.state.step == self.total_steps:
                            self.folder.save(self.state)
                            saved = self.state.step
                    if callback is not None:
                        callback(info)
                    bar.update()
                    bar.set_postfix(loss=f"{info.record.loss:.4f}", refresh=False)
        finally:
            if self.folder is not None and saved < self.state.step:
                self.folder.save(self.state)  # interrupted: keep the last whole step
        return self.state.direction

    def step(self) -> StepInfo:
        """Do the step after `state.step` others: gradient, clipping, AdamW, and the rows made orthonormal again."""
        started = time.perf_counter()
        step = self.state.step
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        minibatches = self._minibatches(order[place * self.config.batch_size : (place + 1) * self.config.batch_size])
        rows = [row for minibatch in minibatches for row in minibatch]
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.objective.accumulate_gradient(
            rows, self._row_weights(minibatches), interchange_with(self.direction, self.config.impl)
        )
        self._require_finite(step, rows, sums)
        assert self.direction.grad is not None
        gradient = self.direction.grad.detach().clone()
        grad_norm = float(torch.nn.utils.clip_grad_norm_([self.direction], self.config.max_grad_norm))
        learning_rate = self.config.learning_rate * (1 - step / self.total_steps)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            self.direction.copy_(orthonormalize(self.direction))
        moments = self.optimizer.state[self.direction]
        losses = self._minibatch_losses(minibatches, sums)
        record = StepRecord(
            step=step + 1,
            epoch=epoch + 1,
            loss=sum(losses) / len(losses),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=sum(len(self._row(row).base.ids) - self.objective.prefix_length for row in rows),
            seconds=time.perf_counter() - started,
            minibatch_losses=losses,
            held_out_loss=self._held_out_loss(epoch, place),
        )
        self.state = Checkpoint(
            step + 1,
            self.direction.detach().cpu().clone(),
            moments["exp_avg"].cpu().clone(),
            moments["exp_avg_sq"].cpu().clone(),
        )
        self.records.append(record)
        return StepInfo(record, gradient.cpu(), self.state.direction)

    def _order(self, epoch: int) -> list[int]:
        """Pairs in the order of an epoch. It depends on seed and epoch alone, so that a resumed run goes on with it."""
        if not self.config.shuffle:
            return list(range(self.pairs))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.pairs, generator=generator).tolist()
        return order

    def _minibatches(self, pairs: list[int]) -> list[list[int]]:
        """Rows of a batch of b pairs, in minibatches of b sequences."""
        rows = [pair * self.rows_per_pair + offset for pair in pairs for offset in range(self.rows_per_pair)]
        return [rows[start : start + len(pairs)] for start in range(0, len(rows), len(pairs))]

    def _row_weights(self, minibatches: list[list[int]]) -> list[float]:
        """Weight of each row's summed divergence in the loss of the step."""
        count = sum(map(len, minibatches))
        if self.config.reduction == "sequence":
            return [1 / (count * self.objective.response_length(row)) for minibatch in minibatches for row in minibatch]
        weights = []
        for minibatch in minibatches:
            tokens = sum(map(self.objective.response_length, minibatch))
            weights += [1 / (len(minibatches) * tokens)] * len(minibatch)
        return weights

    def _minibatch_losses(self, minibatches: list[list[int]], sums: Tensor) -> tuple[float, ...]:
        losses = []
        remaining = sums.tolist()
        for minibatch in minibatches:
            own, remaining = remaining[: len(minibatch)], remaining[len(minibatch) :]
            lengths = list(map(self.objective.response_length, minibatch))
            if self.config.reduction == "token":
                losses.append(sum(own) / sum(lengths))
            else:
                losses.append(sum(total / length for total, length in zip(own, lengths, strict=True)) / len(own))
        return tuple(losses)

    def _held_out_loss(self, epoch: int, place: int) -> float | None:
        last = place == self.steps_per_epoch - 1
        due = (epoch + 1) % self.config.evaluate_every == 0 or epoch + 1 == self.config.epochs
        if self.held_out is None or not (last and due):
            return None
        rows = range(len(self.held_out.cache.rows.rows))
        direction = self.direction.detach()
        losses = self.held_out.evaluate(rows, interchange_with(direction, self.config.impl))
        return self.held_out.average(rows, losses, self.config.reduction)

    def _require_finite(self, step: int, rows: list[int], sums: Tensor) -> None:
        gradient = self.direction.grad
        bad = [
            self._row(row).name for row, total in zip(rows, sums.tolist(), strict=True) if not abs(total) < float("inf")
        ]
        if bad or gradient is None or not torch.isfinite(gradient).all():
            where = ", ".join(bad[:4]) if bad else "the gradient"
            remedy = "The state before this step is kept. Lower the learning rate or load the model in float32."
            raise NonFiniteError(
                expected_got(f"step {step + 1}", "a finite loss and gradient", f"NaN or infinity in {where}", remedy)
            )

    def _row(self, row: int) -> Any:
        return self.objective.cache.rows.rows[row]
