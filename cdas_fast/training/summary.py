"""What a run did: a few lines of text, and the report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from cdas_fast.report import Answer, DivergenceRow, LossCurve, Projections, ReportContent, write_report
from cdas_fast.training.concept_run import ConceptResult
from cdas_fast.training.loop import TrainingResult

WHOLE = 4  # concepts of which several lines are shown


def describe_training(result: TrainingResult) -> str:
    """What a run did, as a few lines of text: losses, factors, time and memory."""
    describe = _describe if len(result.concepts) <= WHOLE else _describe_shortly
    lines = [line for concept_id, outcome in result.concepts.items() for line in describe(concept_id, outcome)]
    lines += [f"Concept {concept_id}: {error}" for concept_id, error in result.failed.items()]
    lines.append(f"Peak memory {result.peak_memory_bytes / 2**30:.2f} GiB")
    return "\n".join(lines)


def _describe(concept_id: int, outcome: ConceptResult) -> list[str]:
    vector, history = outcome.vector, outcome.history
    assert vector.positive is not None
    assert vector.negative is not None
    lines = [
        f"Concept {concept_id}: {vector.concept or 'unnamed'}",
        f"  loss            {history[0].loss:.4f} -> {history[-1].loss:.4f} nats in {len(history)} steps",
    ]
    evaluated = [record.held_out_loss for record in history if record.held_out_loss is not None]
    if evaluated:
        lines.append(f"  held-out loss   {evaluated[0]:.4f} -> {evaluated[-1]:.4f} nats (first, last evaluation)")
    for name, factors in (("a+", vector.positive), ("a-", vector.negative)):
        assert factors.std is not None
        values = zip(factors.mean.flatten().tolist(), factors.std.flatten().tolist(), strict=True)
        lines.append(f"  factor {name}       " + ", ".join(f"{mean:.3f} +- {std:.3f}" for mean, std in values))
    lines.append(
        f"  time            {outcome.cache_seconds:.1f} s caching, {outcome.training_seconds:.1f} s training, "
        f"median step {outcome.step_seconds:.3f} s"
    )
    if outcome.output_dir is not None:
        lines.append(f"  written to      {outcome.output_dir} (report.html, steering_vector.safetensors)")
    return lines


def _describe_shortly(concept_id: int, outcome: ConceptResult) -> list[str]:
    vector, history = outcome.vector, outcome.history
    evaluated = [record.held_out_loss for record in history if record.held_out_loss is not None]
    held_out = f", held out {evaluated[0]:.4f} -> {evaluated[-1]:.4f}" if evaluated else ""
    name = textwrap.shorten(vector.concept or "unnamed", 40, placeholder=" ...")
    return [
        f"Concept {concept_id}: {name}: {history[0].loss:.4f} -> {history[-1].loss:.4f} nats in {len(history)} steps"
        f"{held_out}, {outcome.cache_seconds:.1f} s caching, {outcome.training_seconds:.1f} s training"
    ]


def write_run_report(
    folder: Path,
    result: ConceptResult,
    *,
    answers: Sequence[Answer] = (),
    divergence: Sequence[DivergenceRow] = (),
) -> Path:
    """Write `report.html` into `folder`."""
    vector = result.vector
    assert vector.positive is not None
    assert vector.negative is not None
    assert result.positive_projections is not None
    assert result.negative_projections is not None
    evaluated = [record for record in result.history if record.held_out_loss is not None]
    projections = [
        Projections(
            layer=layer,
            component=component,
            positive=result.positive_projections[:, slot, component].tolist(),
            negative=result.negative_projections[:, slot, component].tolist(),
            factor_positive=float(vector.positive.mean[slot, component]),
            factor_negative=float(vector.negative.mean[slot, component]),
        )
        for slot, layer in enumerate(vector.layers)
        for component in range(vector.rank)
    ]
    first, last = result.history[0], result.history[-1]
    summary = [
        ("Model", vector.base_model or "unnamed"),
        ("Layer", ", ".join(map(str, vector.layers))),
        ("Rank", str(vector.rank)),
        ("Training pairs", str(vector.metadata["pairs"])),
        ("Steps", str(len(result.history))),
        ("Training loss, first and last step", f"{first.loss:.4f} → {last.loss:.4f} nats"),
    ]
    if evaluated:
        values = [record.held_out_loss or 0.0 for record in evaluated]
        summary.append(("Held-out loss, first and last", f"{values[0]:.4f} → {values[-1]:.4f} nats"))
    summary.append(("Median step", f"{result.step_seconds:.3g} s"))
    content = ReportContent(
        title=f"Steering vector: {vector.concept or 'unnamed concept'}",
        summary=summary,
        loss=LossCurve(
            steps=[record.step for record in result.history],
            training=[record.loss for record in result.history],
            held_out_steps=[record.step for record in evaluated],
            held_out=[record.held_out_loss or 0.0 for record in evaluated],
        ),
        projections=projections,
        answers=answers,
        divergence=divergence,
        settings=vector.metadata["settings"],
        versions=vector.metadata["versions"],
    )
    return write_report(folder / "report.html", content)
