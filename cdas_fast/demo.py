"""The demo: train on embedded model and data, steer held-out prompts both ways, measure, report."""

from __future__ import annotations

import importlib.resources
import textwrap
import time
from pathlib import Path

from cdas_fast.benchmark.training import against_published_scheme
from cdas_fast.data.pairs import ContrastivePairs
from cdas_fast.evaluation import HeldOutDivergence, baseline_vectors, divergence_table, held_out_divergence
from cdas_fast.models.loading import EMBEDDED_MODEL, load_model
from cdas_fast.report import Answer, DivergenceRow
from cdas_fast.steering import generate
from cdas_fast.steering.vector import CARD_FILE, CONFIG_FILE, TENSOR_FILE
from cdas_fast.training import TrainingConfig, train
from cdas_fast.training.run_folder import CHECKPOINT, LOG, REPORT
from cdas_fast.training.summary import describe_training, write_run_report

CONFIG = TrainingConfig(
    layer=24,
    rank=6,
    epochs=5,
    batch_size=8,
    learning_rate=0.06,
    max_output_tokens=16,
    initial_direction="difference-in-means",
    evaluate_every=2,
)
PAIRS_SHOWN = 4  # each with its plain prompt and the one that asks for the concept


def demo_pairs() -> tuple[ContrastivePairs, ContrastivePairs]:
    """The embedded pairs about the ocean: those to train on, and those held out."""
    folder = importlib.resources.files("cdas_fast.data") / "demo"
    with importlib.resources.as_file(folder) as place:
        return (
            ContrastivePairs.from_file(place / "ocean_train.jsonl"),
            ContrastivePairs.from_file(place / "ocean_held_out.jsonl"),
        )


def run_demo(output: Path, *, overwrite: bool = False, max_new_tokens: int = 48) -> None:
    """Train, answer held-out prompts, measure against simpler directions, and write everything to `output`."""
    if overwrite:
        for name in (CHECKPOINT, LOG, REPORT, TENSOR_FILE, CONFIG_FILE, CARD_FILE):
            (output / name).unlink(missing_ok=True)
    started = time.perf_counter()
    pairs, held_out = demo_pairs()
    model, tokenizer = load_model(EMBEDDED_MODEL, device="cpu", dtype="float32")
    print(f"Training on {len(pairs)} pairs about {pairs[0].concept!r}, {len(held_out)} held out\n", flush=True)
    result = train(model, tokenizer, pairs, CONFIG, validation=held_out, output_dir=output)
    vector = result.vector

    prompts = [text for pair in held_out[:PAIRS_SHOWN] for text in (pair.negative_input, pair.positive_input)]
    print(f"Answering {len(prompts)} held-out prompts three ways", flush=True)
    ways: dict[str, list[str]] = {"unsteered": generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)}
    for toward in ("positive", "negative"):
        ways[toward] = generate(
            model,
            tokenizer,
            prompts,
            vector,
            toward=toward,
            max_new_tokens=max_new_tokens,
        )
    answers = [Answer(*texts) for texts in zip(prompts, *ways.values(), strict=True)]
    for answer in answers:
        print(_side_by_side(answer))

    print("\nMeasuring the divergence on the held-out pairs", flush=True)
    vectors = {"trained": vector, **baseline_vectors(result.only)}
    rows = held_out_divergence(model, tokenizer, held_out, vectors, cache=result.only.held_out_cache)
    print("\n" + divergence_table(rows) + "\n")
    divergence = [DivergenceRow(_row_name(row), row.toward_positive, row.toward_negative) for row in rows]
    write_run_report(output, result.only, answers=answers, divergence=divergence)
    print("Timing a training step beside one of the published scheme", flush=True)
    times = against_published_scheme(model, tokenizer, pairs, CONFIG)
    print(describe_training(result))
    print(f"A training step of the published scheme takes {times:.1f} times as long, measured now on the first batch.")
    print(f"Whole demo {time.perf_counter() - started:.0f} s. Open {output / REPORT} in a browser.")


def _row_name(row: HeldOutDivergence) -> str:
    ways = {"none": "", "clamp": ", clamped to the factors", "interchange": ", interchange with the pair's own source"}
    return row.name + ways[row.intervention]


def _side_by_side(answer: Answer) -> str:
    lines = [f"\n== {' '.join(answer.prompt.split())}"]
    for name, text in (
        ("unsteered", answer.unsteered),
        ("toward the concept", answer.positive),
        ("away from the concept", answer.negative),
    ):
        lines.append(f"  -- {name}")
        lines.append(textwrap.fill(" ".join(text.split()), 110, initial_indent="     ", subsequent_indent="     "))
    return "\n".join(lines)
