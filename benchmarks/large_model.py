"""A model far larger than it should be for the memory: load, cache and train it in 4 bits, whole and under a cap.

    python -m benchmarks.large_model --folder DIR                     # 8B-shaped: 32 layers of 4096, 128256 tokens
    python -m benchmarks.large_model --folder DIR --layers 8 --width 1024 --inner 2816 --vocabulary 49152 --cap 2

The weights are random, written shard by shard. Each run is a process of its own, whose peak of resident memory is read
from the system and set against the plan. The streamed run is confined to `--cap` GiB, page cache included, by a control
group where one can be made, else its private memory by RLIMIT_DATA; its losses have to be those of the other run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from benchmarks.comparison import report
from cdas_fast.benchmark.report import machine
from cdas_fast.errors import CDASError, InvalidInputError, expected_got

GIB = 2**30
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))  # of control groups, version 1 and 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_model", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for model, packed copy and runs; found again")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336, help="width of the MLP")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--layer", type=int, default=12, help="that is intervened on; default: 12")
    parser.add_argument("--pairs", type=int, default=32, help="of a step; twice as many sequences. Default: 32")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=512)
    parser.add_argument("--max-output-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--resident-layers", type=int, default=2, help="of the streamed run; default: 2")
    parser.add_argument("--cap", type=float, default=6.0, help="GiB for the streamed run; default: 6")
    parser.add_argument("--output", type=Path, help="write large-model.txt and large-model.json there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(_run(options, json.loads(options.child))))
        return 0
    return report("large-model", compare, options)


def compare(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Both runs, the lines of the table, and all of it as JSON values."""
    facts = machine(torch.device("cpu"))
    lines = [f"{name}: {each}" for name, each in facts.items()]
    lines += [f"random Llama: {options.layers} layers of {options.width}, {options.vocabulary} tokens"]
    write_model(options)
    ways = {"whole": None, "streamed": options.resident_layers}
    values: dict[str, Any] = {"machine": facts}
    for name, resident in ways.items():
        cap = None if resident is None else options.cap
        values[name] = run = _in_a_process(options, {"name": name, "resident_layers": resident, "cap": cap})
        confined = "" if cap is None else f", confined to {cap:g} GiB by {run['confined_by']}"
        packed = ", found in 4 bits" if run["is_packed"] else ", quantised meanwhile"
        lines += ["", f"{name}: 4 bits, {options.dtype}, {run['rows']} sequences a step{confined}{packed}"]
        lines += [f"  losses {', '.join(f'{loss:.8f}' for loss in run['losses'])}"]
        lines += [
            f"  {phase:<9}peak {run[f'{phase}_peak'] / GIB:6.2f} GiB, planned {run[f'{phase}_plan'] / GIB:6.2f} "
            f"({run[f'{phase}_peak'] / run[f'{phase}_plan'] - 1:+.1%}), {run[f'{phase}_seconds']:.0f} s"
            for phase in ("caching", "training")
        ]
    one, other = (torch.tensor(values[name]["losses"], dtype=torch.float64) for name in ways)
    values["difference"] = float(((one - other) / one).abs().max())
    lines += ["", f"losses differ by {values['difference']:.1e}, relative"]
    return lines, values


def write_model(options: argparse.Namespace) -> Path:
    """A folder with a random Llama in bfloat16, a shard a layer; one that is there is taken as it is."""
    from transformers import LlamaConfig

    from cdas_fast.models.loading import _embedded_folder

    name = f"llama-{options.layers}x{options.width}x{options.inner}-{options.vocabulary}"
    folder: Path = options.folder / name
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=max(1, options.width // 512),
        head_dim=128,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5, generator=generator)

    keys = max(1, options.width // 512) * 128
    width, inner, files = options.width, options.inner, {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, file))

    for layer in tqdm(range(options.layers), desc="Writing random layers", leave=False, disable=None):
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        tensors = {f"model.layers.{layer}.{each}.weight": random(*shape) for each, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        write(f"model-{layer:05d}.safetensors", tensors)
    write("model-embedding.safetensors", {"model.embed_tokens.weight": random(options.vocabulary, width)})
    head = {"lm_head.weight": random(options.vocabulary, width), "model.norm.weight": torch.ones(width).bfloat16()}
    write("model-head.safetensors", head)
    config.save_pretrained(folder)
    for file in _embedded_folder().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_bytes((_embedded_folder() / "chat_template.jinja").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def _in_a_process(options: argparse.Namespace, child: dict[str, Any]) -> dict[str, Any]:
    group = None if child["cap"] is None else _make_group(int(child["cap"] * GIB))
    child = {**child, "group": None if group is None else str(group)}
    command = [sys.executable, "-m", "benchmarks.large_model", *sys.argv[1:], "--child", json.dumps(child)]
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        if group is not None:
            group.rmdir()
    if ran.returncode:
        raise CDASError(f"the {child['name']} run ended with exit code {ran.returncode}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _make_group(limit: int) -> Path | None:
    """A control group whose processes share so many bytes of memory; None where none can be made."""
    for parent in GROUPS:
        group = parent / f"cdas-fast-{os.getpid()}"
        for name in ("memory.limit_in_bytes", "memory.max"):
            try:
                group.mkdir(exist_ok=True)
                if (group / name).exists():
                    (group / name).write_text(str(limit))
                    return group
            except OSError:
                continue
        if group.is_dir():
            group.rmdir()
    return None


def _confine(child: dict[str, Any]) -> str:
    if child["cap"] is None:
        return "nothing"
    if child["group"] is not None:
        (Path(child["group"]) / "cgroup.procs").write_text(str(os.getpid()))
        return "a control group"
    import resource

    limit = int(child["cap"] * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return "RLIMIT_DATA"


def _run(options: argparse.Namespace, child: dict[str, Any]) -> dict[str, Any]:
    """Train, and say what it took."""
    confined_by = _confine(child)
    packed = options.folder / "packed"
    name = write_model(options).name
    child["is_packed"] = any((each / "config.json").exists() for each in packed.glob(f"{name}-*"))
    import cdas_fast
    from cdas_fast.demo import demo_pairs
    from cdas_fast.training.concept_run import RunContext

    peaks: dict[str, int] = {}
    started = time.perf_counter()
    marks = {"start": started}
    pairs = cdas_fast.ContrastivePairs(list(demo_pairs()[0])[: options.pairs])
    if len(pairs) < options.pairs:
        raise InvalidInputError(expected_got("--pairs", f"at most {len(pairs)}", options.pairs))
    config = cdas_fast.TrainingConfig(
        layer=options.layer,
        epochs=options.steps,
        batch_size=options.pairs,
        max_output_tokens=options.max_output_tokens,
        micro_batch_tokens=options.micro_batch_tokens,
        recompute=True,
    )
    cache = RunContext.cache_in_layer_order

    def noting(*args: Any, **kwargs: Any) -> None:
        cache(*args, **kwargs)
        peaks["caching"] = _peak_and_reset()
        marks["cached"] = time.perf_counter()

    model, tokenizer = cdas_fast.load_model(
        write_model(options),
        dtype=options.dtype,
        device="cpu",
        load_in_4bit=True,
        resident_layers=child["resident_layers"],
        packed_dir=packed,
    )
    with mock.patch.object(RunContext, "cache_in_layer_order", noting):
        result = cdas_fast.train(model, tokenizer, pairs, config)
    peaks["training"] = _peak_and_reset()
    ended = time.perf_counter()
    plan = _plan(options, child, result.only)
    return {
        "confined_by": confined_by,
        "is_packed": child["is_packed"],
        "losses": [record.loss for record in result.history],
        "rows": 2 * options.pairs,
        "caching_peak": peaks["caching"],
        "training_peak": peaks["training"],
        "caching_seconds": marks["cached"] - marks["start"],
        "training_seconds": ended - marks["cached"],
        **plan,
    }


def _plan(options: argparse.Namespace, child: dict[str, Any], result: Any) -> dict[str, float]:
    from cdas_fast.distributed.hardware import parse_machine
    from cdas_fast.distributed.model_sizes import model_sizes
    from cdas_fast.distributed.plan_memory import QUANTISING
    from cdas_fast.distributed.plan_workload import Strategy, make_workload
    from cdas_fast.distributed.planner import plan_of

    rows = result.cache.rows.rows
    lengths = [result.cache.base_length(number) for number in range(len(rows))]
    work = make_workload(
        model_sizes(str(write_model(options))),
        options.layer,
        tokens=sum(lengths),
        response_tokens=sum(row.base.response_length for row in rows),
        sequence_tokens=max(lengths),
        sequences=len(rows),
        dtype=options.dtype,
    )
    strategy = Strategy("one process", True, options.micro_batch_tokens, True, child["resident_layers"], "disk")
    plan = plan_of(work, parse_machine("cpu"), strategy)
    caching = {name: size for name, size in plan.caching.items() if not (child["is_packed"] and name == QUANTISING)}
    return {"caching_plan": sum(caching.values()), "training_plan": sum(plan.training.values())}


def _peak_and_reset() -> int:
    """Most memory that was resident since the last call."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak


if __name__ == "__main__":
    sys.exit(main())
