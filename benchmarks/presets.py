"""The presets beside each other: held-out divergence after training, over data sets, layers and seeds.

    python -m benchmarks.presets --train F --validation F [--presets published fast] [--layers 10 15 20] [--seeds 0 1 2]
        [--output DIR] [--epochs 20 --learning-rate 0.02 ...]

Every preset trains with the same pairs, batch size, reduction and model; what else is given on the command line holds
for `published` alone, for data whose published settings are others. A preset may be given fewer epochs by
`--epochs-of fast 5`. The table shows, for each layer, the mean divergence (JSD in nats) over the held-out pairs before
and after, the median of the seeds, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import cdas_fast
from benchmarks.comparison import report
from cdas_fast import ContrastivePairs, TrainingConfig
from cdas_fast.benchmark.report import machine
from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.evaluation import held_out_divergence
from cdas_fast.training.config import PRESETS


def settings_of(options: argparse.Namespace, preset: str, layer: int, seed: int) -> TrainingConfig:
    """The settings of one run."""
    common = {"batch_size": options.batch_size, "max_output_tokens": options.max_output_tokens}
    config = TrainingConfig.preset(
        preset, layer=layer, seed=seed, reduction=options.reduction, evaluate_every=10**6, **common
    )
    if preset == "published":
        config = replace(config, epochs=options.epochs, learning_rate=options.learning_rate)
    for name, epochs in options.epochs_of:
        if name == preset:
            config = replace(config, epochs=int(epochs))
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", type=Path, required=True, help="pairs to train on; of several concepts the first")
    parser.add_argument("--validation", type=Path, help="held-out pairs; default: the last --held-out of --train")
    parser.add_argument("--held-out", type=int, default=8, help="without --validation, so many pairs are held out")
    parser.add_argument("--presets", nargs="+", default=["published", "fast"])
    parser.add_argument("--layers", nargs="+", type=int, default=[10, 15, 20])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-output-tokens", type=int, default=128)
    parser.add_argument("--reduction", choices=("sequence", "token"), default="token")
    parser.add_argument("--epochs", type=int, default=18, help="of published")
    parser.add_argument("--learning-rate", type=float, default=0.04, help="of published")
    parser.add_argument("--epochs-of", nargs=2, action="append", default=[], metavar=("PRESET", "N"))
    parser.add_argument("--output", type=Path, help="write presets.txt and presets.json there")
    return report("presets", compare, parser.parse_args(arguments))


def compare(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The table as lines, and everything as JSON values."""
    if unknown := [
        name for name in (*options.presets, *(name for name, _ in options.epochs_of)) if name not in PRESETS
    ]:
        raise InvalidInputError(expected_got("preset", " or ".join(PRESETS), unknown[0]))
    pairs, held_out = _split(options)
    model, tokenizer = cdas_fast.load_model(options.model, dtype=options.dtype)
    found: list[dict[str, Any]] = []
    untrained: dict[int, float] = {}
    count = len(options.layers) * len(options.seeds) * len(options.presets)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count, disable=None, leave=False) as bar:
        for layer in options.layers:
            for seed in options.seeds:
                for preset in options.presets:
                    bar.set_description(f"layer {layer}, seed {seed}, {preset}")
                    config = settings_of(options, preset, layer, seed)
                    result = cdas_fast.train(
                        model,
                        tokenizer,
                        pairs,
                        config,
                        validation=held_out,
                        activations_dir=folder,
                        progress=False,
                    )
                    if layer not in untrained:
                        untrained[layer] = _without_steering(model, tokenizer, held_out, result, options)
                    found.append(
                        {
                            "layer": layer,
                            "seed": seed,
                            "preset": preset,
                            "steps": len(result.history),
                            "held_out": result.history[-1].held_out_loss,
                            "training_seconds": result.only.training_seconds,
                        }
                    )
                    bar.update()
    lines = [
        f"{options.model}, {options.dtype}, {len(pairs)} pairs of {options.train.name}, {len(held_out)} held out, "
        f"batch {options.batch_size}, {options.reduction} reduction; JSD in nats, median (lowest to highest) of "
        f"{len(options.seeds)} seeds",
        f"{'layer':>5}  {'not steered':>11}  " + "  ".join(f"{name + ', steps':>32}" for name in options.presets),
    ]
    for layer in options.layers:
        cells = []
        for preset in options.presets:
            own = [each for each in found if each["layer"] == layer and each["preset"] == preset]
            losses = [each["held_out"] for each in own]
            spread = f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
            cells.append(f"{spread}, {own[0]['steps']:>4}".rjust(32))
        lines.append(f"{layer:>5}  {untrained[layer]:>11.4f}  " + "  ".join(cells))
    values = {
        "machine": machine(next(model.parameters()).device),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "presets": {
            name: settings_of(options, name, options.layers[0], options.seeds[0]).to_dict() for name in options.presets
        },
        "not_steered": untrained,
        "runs": found,
    }
    return lines, values


def _split(options: argparse.Namespace) -> tuple[ContrastivePairs, ContrastivePairs]:
    pairs = ContrastivePairs.from_file(options.train)
    pairs = pairs.of_concept(pairs.concept_ids[0])
    if options.validation is not None:
        return pairs, ContrastivePairs.from_file(options.validation)
    if not 0 < options.held_out < len(pairs):
        raise InvalidInputError(expected_got("--held-out", f"1 to {len(pairs) - 1}", options.held_out))
    return pairs[: -options.held_out], pairs[-options.held_out :]


def _without_steering(
    model: Any, tokenizer: Any, pairs: ContrastivePairs, result: Any, options: argparse.Namespace
) -> float:
    rows = held_out_divergence(
        model,
        tokenizer,
        pairs,
        {"trained": result.vector},
        reduction=options.reduction,
        max_output_tokens=options.max_output_tokens,
        cache=result.only.held_out_cache,
    )
    lengths = {"positive": 0, "negative": 0}
    for row in result.only.held_out_cache.rows.rows:
        lengths[row.toward] += row.base.response_length if options.reduction == "token" else 1
    total = rows[0].toward_positive * lengths["positive"] + rows[0].toward_negative * lengths["negative"]
    return float(total / sum(lengths.values()))


if __name__ == "__main__":
    sys.exit(main())
