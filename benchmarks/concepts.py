"""Many concepts in one run beside one run each: agreement, time, memory, and what follows for a whole workload.

    python -m benchmarks.concepts [--data F] [--concepts 16] [--dtype bfloat16] [--layer 15] [--output DIR] ...

The pairs of the data, whatever their own concepts, are dealt out to so many pseudo-concepts of equal size. Activations
are cached once and kept, so that what is compared is training alone:

    alone     `train` once for each concept, one after the other
    together  `train` once for all, `concepts_together` of them at a time

Rounds alternate which goes first. The last lines say what a workload of so many concepts and pairs (500 x 72, as in
AxBench) comes to if its pairs are like these: products of what was measured, computed and not measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import cdas_fast
from benchmarks.comparison import report
from cdas_fast import ContrastivePairs, TrainingConfig
from cdas_fast.benchmark.report import machine
from cdas_fast.demo import demo_pairs
from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.training import TrainingResult


@dataclass(frozen=True)
class Run:
    """One way to train all concepts once."""

    seconds: float  # of all steps
    wall_seconds: float  # from call to return, without caching: also what each run does before its first step
    anonymous_bytes: int | None  # most memory that no file backs, beyond what there was before; None if not known
    result: Mapping[int, Any]  # concept -> ConceptResult


def deal(pairs: ContrastivePairs, count: int) -> ContrastivePairs:
    """The pairs as `count` pseudo-concepts of equal size; what is left over is not used."""
    each = len(pairs) // count
    if each < 1:
        raise InvalidInputError(expected_got("--concepts", f"at most {len(pairs)}, the number of pairs", count))
    return ContrastivePairs(
        replace(pair, concept_id=number // each, concept=f"pseudo-concept {number // each}")
        for number, pair in enumerate(pairs[: each * count])
    )


class AnonymousPeak:
    """Watches the memory of this process that no file backs, ten times a second."""

    def __init__(self) -> None:
        self.peak = self.before = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def increase(self) -> int | None:
        """Bytes at the peak beyond those at the start; None where the system does not tell."""
        return None if self.peak is None or self.before is None else self.peak - self.before

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            now = self._now()
            if now is not None and self.peak is not None:
                self.peak = max(self.peak, now)

    @staticmethod
    def _now() -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


class Comparison:
    """Both ways to train the concepts of `pairs`."""

    def __init__(
        self, model: Any, tokenizer: Any, pairs: ContrastivePairs, config: TrainingConfig, store: Path
    ) -> None:
        self.model, self.tokenizer, self.pairs, self.config, self.store = model, tokenizer, pairs, config, store

    def cache(self) -> float:
        """Compute all activations, and how long that took."""
        started = time.perf_counter()
        self._train(self.pairs, replace(self.config, epochs=1, batch_size=len(self.pairs), learning_rate=0.0))
        return time.perf_counter() - started

    def alone(self) -> Run:
        """One run each."""
        wall, results = 0.0, {}
        with AnonymousPeak() as memory:
            for concept in self.pairs.concept_ids:
                took, result = self._train(self.pairs.of_concept(concept), self.config)
                wall += took
                results[concept] = result.only
        return Run(_of_steps(results), wall, memory.increase, results)

    def together(self, limit: int | None) -> Run:
        """One run for all."""
        with AnonymousPeak() as memory:
            wall, result = self._train(self.pairs, replace(self.config, concepts_together=limit))
        return Run(_of_steps(result.concepts), wall, memory.increase, result.concepts)

    def _train(self, pairs: ContrastivePairs, config: TrainingConfig) -> tuple[float, TrainingResult]:
        started = time.perf_counter()
        result = cdas_fast.train(self.model, self.tokenizer, pairs, config, activations_dir=self.store, progress=False)
        waiting = sum(concept.cache_seconds for concept in result.concepts.values())
        return time.perf_counter() - started - waiting, result


def _of_steps(results: Mapping[int, Any]) -> float:
    return float(sum(result.training_seconds for result in results.values()))


@dataclass(frozen=True)
class Workload:
    """What is to be trained."""

    concepts: int
    pairs: int  # of each concept
    epochs: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From CONCEPTSxPAIRSxEPOCHS."""
        numbers = text.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise InvalidInputError(expected_got("--workload", "CONCEPTSxPAIRSxEPOCHS, such as 500x72x18", text))
        return cls(*map(int, numbers))

    def plan(self, config: TrainingConfig, run: Run, caching_seconds: float, cached_bytes: int) -> dict[str, Any]:
        """Its time and memory if its pairs are like those of `run`, which had these settings."""
        results = run.result.values()
        cached_pairs = sum(result.vector.metadata["pairs"] for result in results)
        trained_pairs = cached_pairs * config.epochs
        tokens = sum(record.tokens for result in results for record in result.history)
        rank, width = next(iter(results)).vector.direction.shape
        caching = self.concepts * self.pairs * caching_seconds / cached_pairs
        training = self.concepts * self.pairs * self.epochs * run.seconds / trained_pairs
        return {
            **asdict(self),
            "steps_a_concept": self.epochs * -(-self.pairs // config.batch_size),
            "tokens_a_step": round(config.batch_size * tokens / trained_pairs),
            "caching_hours": caching / 3600,
            "training_hours": training / 3600,
            "concepts_per_hour": self.concepts / ((caching + training) / 3600),
            "mapped_bytes_a_concept_at_work": self.pairs * cached_bytes // cached_pairs,
            "state_bytes_a_concept_at_work": 3 * 4 * rank * width,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="pairs; default: those of the demo")
    parser.add_argument("--concepts", type=int, default=16)
    parser.add_argument("--concepts-together", type=int, help="default: as many as fill a micro-batch")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workload", default="500x72x18", help="concepts x pairs x epochs; default: 500x72x18")
    parser.add_argument("--output", type=Path, help="write concepts.txt and concepts.json there")
    return report("concepts", compare, parser.parse_args(arguments))


def compare(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The table as lines, and everything as JSON values."""
    goal = Workload.parse(options.workload)
    given = demo_pairs()[0] if options.data is None else ContrastivePairs.from_file(options.data)
    pairs = deal(given, options.concepts)
    config = TrainingConfig(
        layer=options.layer,
        epochs=options.epochs,
        batch_size=options.batch_size,
        max_output_tokens=options.max_output_tokens,
    )
    model, tokenizer = cdas_fast.load_model(options.model, dtype=options.dtype)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * options.rounds + 1, disable=None, leave=False) as bar:
        work = Comparison(model, tokenizer, pairs, config, Path(folder))
        bar.set_description("caching")
        caching = work.cache()
        bar.update()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.bin"))
        rounds: list[dict[str, Run]] = []
        for number in range(options.rounds):
            found = {}
            for name in ("alone", "together") if number % 2 == 0 else ("together", "alone"):
                bar.set_description(name)
                found[name] = work.alone() if name == "alone" else work.together(options.concepts_together)
                bar.update()
            rounds.append(found)
    last = rounds[-1]
    cosines = {
        concept: last["together"].result[concept].vector.cosine(result.vector)
        for concept, result in last["alone"].result.items()
    }
    ratio = statistics.median(each["together"].seconds / each["alone"].seconds for each in rounds)
    seconds = {name: statistics.median(each[name].seconds for each in rounds) for name in last}
    wall = {name: statistics.median(each[name].wall_seconds for each in rounds) for name in last}
    plan = goal.plan(config, last["together"], caching, size)
    memory = {name: [each[name].anonymous_bytes for each in rounds] for name in last}
    shown = {name: _mebibytes(values) for name, values in memory.items()}
    lines = [
        f"{options.model}, layer {options.layer}, {options.dtype}: {len(pairs)} pairs dealt out to {options.concepts} "
        f"concepts, {options.epochs} epochs, batch {options.batch_size}",
        f"  alone     {seconds['alone']:8.1f} s of steps, the sum of all ({wall['alone']:.1f} s from call to return); "
        f"memory {shown['alone']}",
        f"  together  {seconds['together']:8.1f} s of steps, {ratio:.2f} times that ({wall['together']:.1f} s); "
        f"memory {shown['together']}",
        f"  cosine of the directions: {min(cosines.values()):.6f} at least",
        f"{goal.concepts} concepts of {goal.pairs} pairs like these, {goal.epochs} epochs (computed, not measured):",
        f"  {plan['steps_a_concept']} steps of {plan['tokens_a_step']} tokens each a concept",
        f"  caching {plan['caching_hours']:.1f} h, training {plan['training_hours']:.1f} h: "
        f"{plan['concepts_per_hour']:.1f} concepts an hour",
        f"  a concept at work: {plan['mapped_bytes_a_concept_at_work'] / 2**20:.1f} MiB of files, mapped; "
        f"direction and moments {plan['state_bytes_a_concept_at_work'] / 2**10:.1f} KiB",
    ]
    values = {
        "machine": machine(next(model.parameters()).device),
        "settings": {name: str(value) for name, value in vars(options).items()},
        "seconds": {name: [each[name].seconds for each in rounds] for name in last},
        "wall_seconds": {name: [each[name].wall_seconds for each in rounds] for name in last},
        "ratio": ratio,
        "caching_seconds": caching,
        "anonymous_bytes": memory,
        "cosines": cosines,
        "workload": plan,
    }
    return lines, values


def _mebibytes(sizes: Sequence[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f"{max(known) / 2**20:.0f} MiB" if known else "n/a"


if __name__ == "__main__":
    sys.exit(main())
