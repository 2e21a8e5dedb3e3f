"""The memory planner: sizes from configs, memory by part against other accounts of it, choice, command."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from cdas_fast.cli import build_parser, main
from cdas_fast.distributed.hardware import CARDS, GIB, USABLE, parse_machine
from cdas_fast.distributed.model_sizes import FOUR_BIT_BYTES, ModelSizes, model_sizes, sizes_of
from cdas_fast.distributed.plan_report import as_json, command, describe, refusal
from cdas_fast.distributed.plan_workload import Strategy, Workload, make_workload
from cdas_fast.distributed.planner import MARGIN, Decision, Plan, decide, plan_of
from cdas_fast.errors import DoesNotFitError, InvalidInputError, UnsupportedError
from cdas_fast.ops.gated_activation import gated_activation
from cdas_fast.ops.rms_norm import rms_norm

LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"
WIDTHS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
HEAD_DIM = 64


@pytest.fixture(scope="module")
def llama_70b() -> ModelSizes:
    """Sizes of the largest model."""
    return model_sizes(LLAMA_70B)


@pytest.fixture(scope="module")
def llama_8b() -> ModelSizes:
    """Sizes of a middling one."""
    return model_sizes("meta-llama/Llama-3.1-8B-Instruct")


# sizes


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("microsoft/Phi-3.5-mini-instruct", 3_821_079_552),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_shipped_configs_have_the_published_number_of_parameters(
    model: str, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", _no_hub)  # they need neither files nor network
    sizes = model_sizes(model)
    assert sizes.parameters == parameters
    head = 0 if sizes.tied else sizes.head_values
    layers = sum(layer.linear_values + layer.dense_values for layer in sizes.layers)
    assert layers + sizes.embedding_values + head + sizes.final_values == parameters


def _no_hub(name: str) -> Any:
    raise OSError(f"We couldn't connect to the hub to load {name}.\nMore of it.")


def test_a_layer_of_70b_has_the_bytes_of_nf4_with_double_quantisation(llama_70b: ModelSizes) -> None:
    layer = llama_70b.layers[0]
    assert layer.linear_values == 150_994_944 + 704_643_072
    assert layer.linear_values * FOUR_BIT_BYTES / 1e6 == pytest.approx(441.4, abs=0.05)
    assert layer.largest_linear == 8192 * 28672
    assert layer.kept_bytes(2) / 1000 == pytest.approx(184, rel=0.01)
    assert llama_70b.head_values * 2 / GIB == pytest.approx(1.957, rel=1e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_are_those_of_the_model(family: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    sizes = sizes_of(CONFIGS[family](), family)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = model.model.layers[-1]
    linear = sum(each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear))
    assert sizes.layers[-1].linear_values == linear
    assert sizes.layers[-1].dense_values == sum(each.numel() for each in layer.parameters()) - linear
    assert sizes.final_values == model.model.norm.weight.numel()
    assert sizes.tied == (model.lm_head.weight is model.model.embed_tokens.weight)


def test_a_folder_needs_its_config_alone(tmp_path: Path) -> None:
    CONFIGS["qwen2"]().save_pretrained(tmp_path)
    sizes = model_sizes(str(tmp_path))
    assert (sizes.num_layers, sizes.hidden_size, sizes.vocabulary) == (5, 32, 320)


# activations, against PyTorch's own account of a run


class Tracked:
    """Memory of a forward and backward pass through decoder layers with frozen weights, without numbers.

    Fake tensors for a GPU need a build of PyTorch with CUDA, so these are the CPU's.
    """

    def __init__(self, config: Any, layers: int, tokens: int, *, frozen_aware: bool) -> None:
        with FakeTensorMode():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            _freeze(model)
            if frozen_aware:
                _use_frozen_aware_ops(model)
            width, eager = config.hidden_size, model.config._attn_implementation == "eager"
            hidden = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
            rotary = tuple(torch.empty(1, tokens, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2))
            mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bfloat16) if eager else None
            tracker = MemTracker()
            tracker.track_external(model, hidden)
            with tracker:
                self.after = [_total(tracker)]
                for layer in model.model.layers[:layers]:
                    hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask)
                    self.after.append(_total(tracker))
                torch.autograd.backward(hidden, torch.empty_like(hidden))
            self.peak = _total(tracker, "peak")


def _total(tracker: MemTracker, kind: str = "current") -> int:
    return int(next(iter(tracker.get_tracker_snapshot(kind).values()))["Total"])


def _freeze(model: nn.Module) -> None:
    """Weights as buffers: the tracker takes every parameter for a trained one."""
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


def _use_frozen_aware_ops(model: Any) -> None:
    def norm(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: rms_norm(x, module.weight, eps=1e-6, impl="reference")

    def mlp(module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: module.down_proj(
            gated_activation(module.gate_proj(x), module.up_proj(x), activation="silu", impl="reference")
        )

    for layer in model.model.layers:
        layer.input_layernorm.forward = norm(layer.input_layernorm)
        layer.post_attention_layernorm.forward = norm(layer.post_attention_layernorm)
        layer.mlp.forward = mlp(layer.mlp)


def _wide(family: str) -> Any:
    config = CONFIGS[family]()
    for name, value in {**WIDTHS, "head_dim": HEAD_DIM, "sliding_window": 4096}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("family", CONFIGS)
def test_what_layers_keep_is_what_autograd_keeps(family: str) -> None:
    tokens = 512
    sizes = sizes_of(_wide(family), family).layers[0]
    tracked = Tracked(_wide(family), 3, tokens, frozen_aware=False)
    kept = (tracked.after[-1] - tracked.after[-2]) / tokens
    assert sizes.kept_bytes(2, frozen_aware=False, score_keys=tokens) == pytest.approx(kept, rel=0.1)
    # the gradient of the last layer's output is the caller's: the tracker counts it, and so does the formula
    transient = (tracked.peak - tracked.after[-1]) / tokens + 2 * sizes.hidden
    assert sizes.backward_bytes(2) == pytest.approx(transient, rel=0.1)


@pytest.mark.parametrize("tokens", [128, 2048])
def test_frozen_aware_ops_keep_what_the_plan_says(tokens: int) -> None:
    config = LlamaConfig(**WIDTHS, num_hidden_layers=4, vocab_size=1000)
    sizes = sizes_of(config, "llama").layers[0]
    tracked = Tracked(config, 4, tokens, frozen_aware=True)
    for before, after in itertools.pairwise(tracked.after[1:]):
        assert sizes.kept_bytes(2) == pytest.approx((after - before) / tokens, rel=0.01)
    assert sizes.kept_bytes(2) < 0.7 * sizes.kept_bytes(2, frozen_aware=False)
    transient = (tracked.peak - tracked.after[-1]) / tokens + 2 * sizes.hidden
    assert sizes.backward_bytes(2) == pytest.approx(transient, rel=0.1)


@pytest.mark.parametrize("tokens", [128, 2048])
def test_a_recomputed_layer_takes_what_the_plan_says(tokens: int) -> None:
    config = LlamaConfig(**WIDTHS, num_hidden_layers=4, vocab_size=1000)
    sizes = sizes_of(config, "llama")
    tracked = Tracked(config, 1, tokens, frozen_aware=True)
    work = make_workload(sizes, 1, tokens=tokens)
    parts = plan_of(work, parse_machine("cpu"), Strategy("one process", False, tokens, recompute=True)).training
    # the layer's input is among the kept hidden states, and its norm's input is the same tensor
    assert parts["layer at work"] == pytest.approx(tracked.peak - tracked.after[0], rel=0.1)


# memory plans, against those worked out by hand for 48 layers of Llama-3.1-70B (layer 32 among the suffix)

BY_HAND = {
    "24 layers resident, 24 streamed": ("1x24", Strategy("one process", True, 0, True, 24, "host memory")),
    "all streamed": ("1x24", Strategy("one process", True, 0, True, 0, "host memory")),
    "all resident": ("1x48", Strategy("one process", True, 0, True)),
    "nothing recomputed": ("1x80", Strategy("one process", True, 0, False)),
    "ZeRO-3": ("2x24", Strategy("ZeRO-3", True, 0, True)),
}


@pytest.mark.parametrize(
    ("way", "tokens", "gib"),
    [
        *(
            ("24 layers resident, 24 streamed", tokens, gib)
            for tokens, gib in ((1024, 16.0), (2048, 17.1), (4096, 19.5))
        ),
        *(("all streamed", tokens, gib) for tokens, gib in ((1024, 6.1), (2048, 7.3), (4096, 9.6))),
        *(("all resident", tokens, gib) for tokens, gib in ((1024, 25.2), (2048, 26.4), (4096, 28.7))),
        *(("nothing recomputed", tokens, gib) for tokens, gib in ((1024, 32.9), (2048, 41.8), (4096, 59.5))),
        ("ZeRO-3", 2048, 17.8),
    ],
)
def test_plans_agree_with_those_worked_out_by_hand(way: str, tokens: int, gib: float, llama_70b: ModelSizes) -> None:
    gpus, strategy = BY_HAND[way]
    machine = parse_machine(gpus)
    work = make_workload(llama_70b, 31, tokens=tokens * machine.gpus)
    plan = plan_of(work, machine, replace(strategy, micro_batch_tokens=tokens))
    peak = sum(plan.training.values())
    if strategy.streams:  # those have one dequantised matrix at a time, where this engine keeps the layer's
        layer = llama_70b.layers[0]
        peak -= (layer.linear_values - layer.largest_linear) * 2
    assert peak / GIB == pytest.approx(gib, rel=0.1)


def test_steps_take_the_work_that_was_worked_out_by_hand(llama_70b: ModelSizes) -> None:
    work, machine = make_workload(llama_70b, 31, tokens=4096), parse_machine("1x80", tflops=1.0)
    recomputed = plan_of(work, machine, Strategy("one process", True, 4096, True, 0, "host memory"))
    assert recomputed.step.products == pytest.approx(1022, rel=0.01)
    assert recomputed.step.transfer == pytest.approx(1.7, rel=0.01)
    kept = plan_of(work, machine, Strategy("one process", True, 4096, False))
    assert kept.step.products == pytest.approx(686, rel=0.01)
    zero = plan_of(replace(work, tokens=8192), parse_machine("2x24"), Strategy("ZeRO-3", True, 4096, True))
    assert zero.step.transfer == pytest.approx(3.2 * 2 / 3, rel=0.01)  # by hand three gathers were counted


def test_every_part_is_counted_once(llama_8b: ModelSizes) -> None:
    work = make_workload(llama_8b, 12, tokens=1000, rank=3)
    strategy = Strategy("one process", True, 300, True, 5, "host memory", offload=True)
    plan = plan_of(work, parse_machine("1x24"), strategy)
    layer = llama_8b.layers[0]
    width = 4096
    assert plan.training == pytest.approx(
        {
            "CUDA context": 0.7 * GIB,
            "resident layers": 5 * layer.linear_values * FOUR_BIT_BYTES,
            "norms and biases": 32 * 2 * width * 2 + width * 2,
            "output head": 128_256 * width * 2,
            "ring of 3 layers": 3 * layer.linear_values * FOUR_BIT_BYTES,
            "dequantised layer": layer.linear_values * 2,
            "hidden states on their way": 2 * 300 * width * 2,
            "layer at work": 300 * (layer.kept_bytes(2) + layer.backward_bytes(2)),
            "states and gradients of the step": 2 * 1000 * width * 2,
            "loss: chunk of logits": 0.25 * GIB,
            "loss: gradient rows, final states": 500 * width * (4 + 2 * 2),
            "cached micro-batch": 300 * width * 2,
            "direction and optimiser": 4 * 3 * width * 4,
        }
    )
    assert plan.host_training["streamed layers, pinned by each"] == pytest.approx(
        14 * layer.linear_values * FOUR_BIT_BYTES
    )
    assert plan.host_training["hidden states, pinned"] == 19 * 1000 * width * 2
    assert plan.disk["cached hidden states at layer L"] == 256 * 256 * width * 2


def test_data_parallel_shares_host_memory_and_divides_tokens(llama_70b: ModelSizes) -> None:
    work = make_workload(llama_70b, 32)
    strategy = Strategy("data parallel", True, 1024, True, 10, "host memory", offload=True)
    one = plan_of(replace(work, tokens=1024, response_tokens=512), parse_machine("1x24"), strategy)
    four = plan_of(work, parse_machine("4x24"), strategy)
    assert four.training == one.training
    pinned = "streamed layers, pinned by each"
    assert four.host_training[pinned] == 4 * one.host_training[pinned]
    assert four.host_training["hidden states, pinned"] == 4 * one.host_training["hidden states, pinned"]


def test_caching_is_the_peak_where_the_embedding_is_large(llama_70b: ModelSizes) -> None:
    plan = plan_of(make_workload(llama_70b, 79), parse_machine("1x24"), Strategy("one process", True, 4096))
    assert plan.peak == max(sum(plan.caching.values()), sum(plan.training.values()))
    assert "dequantised layer" in plan.caching


# the choice


def _plans(sizes: ModelSizes, layer: int) -> Iterator[Plan]:
    for gpus, tokens in itertools.product(("1x8", "1x12", "1x24", "2x24", "1x48", "1x80", "8x24"), (512, 4096, 32768)):
        chosen = decide(make_workload(sizes, layer, tokens=tokens), parse_machine(gpus)).chosen
        if chosen is not None:
            yield chosen


def test_a_plan_leaves_a_margin(llama_70b: ModelSizes, llama_8b: ModelSizes) -> None:
    plans = [*_plans(llama_70b, 32), *_plans(llama_8b, 12)]
    assert len(plans) > 20
    for plan in plans:
        assert max(sum(plan.training.values()), sum(plan.caching.values())) + MARGIN <= plan.machine.usable
        assert plan.machine.usable < plan.machine.card.memory_gib * GIB


def test_as_many_layers_are_resident_as_fit(llama_70b: ModelSizes) -> None:
    streamed = [plan for plan in _plans(llama_70b, 32) if plan.strategy.streams]
    assert len(streamed) > 5
    for plan in streamed:
        resident = plan.strategy.resident_layers
        assert resident is not None
        more = plan_of(plan.workload, plan.machine, replace(plan.strategy, resident_layers=resident + 1))
        assert not more.fits or resident + 1 + 3 >= len(plan.workload.suffix)


@pytest.mark.parametrize("four_bit", [None, True, False])
@pytest.mark.parametrize(("model", "layer"), [(LLAMA_70B, 32), ("google/gemma-2-9b-it", 20)])
def test_more_memory_is_never_slower(model: str, layer: int, four_bit: bool | None) -> None:
    work = make_workload(model_sizes(model), layer)
    for count in (1, 2):
        seconds = [
            decision.chosen.step.total if decision.chosen else float("inf")
            for gib in range(4, 100, 2)
            for decision in [decide(work, parse_machine(f"{count}x{gib}", tflops=50), four_bit=four_bit)]
        ]
        # the table gives larger cards more bandwidth too; TFLOPS are held fixed
        assert all(later <= earlier for earlier, later in itertools.pairwise(seconds))


def test_more_tokens_take_more_until_they_do_not_fit(llama_70b: ModelSizes) -> None:
    machine, strategy = parse_machine("1x24"), Strategy("one process", True, 1024, True, 24, "host memory")
    peaks = [
        plan_of(make_workload(llama_70b, 32, tokens=tokens), machine, strategy).peak for tokens in (1024, 4096, 16384)
    ]
    assert peaks == sorted(peaks)
    assert peaks[-1] > machine.usable
    decisions = [
        decide(make_workload(llama_70b, 32, tokens=length, sequence_tokens=length), machine, four_bit=True)
        for length in (1024, 4096, 16384, 65536)
    ]
    assert [decision.chosen is not None for decision in decisions] == [True, True, True, False]
    for decision in decisions:
        for plan in decision.considered:
            assert plan.strategy.micro_batch_tokens >= plan.workload.sequence_tokens


def test_seventy_billions_on_modest_gpus(llama_70b: ModelSizes) -> None:
    work = make_workload(llama_70b, 32)

    def chosen(gpus: str, **settings: Any) -> Strategy:
        decision = decide(work, parse_machine(gpus, **settings))
        assert decision.chosen is not None
        return decision.chosen.strategy

    assert chosen("1x24").streams
    assert chosen("1x24").source == "host memory"
    assert chosen("1x24", host_gib=8).source == "disk"
    assert chosen("2x24").processes == "data parallel"
    assert not chosen("1x80").streams
    assert not chosen("1x80").recompute
    assert not chosen("8xh100").streams


def test_data_parallel_is_preferred_to_zero_3(llama_70b: ModelSizes) -> None:
    decision = decide(make_workload(llama_70b, 32), parse_machine("2x24"), four_bit=True)
    assert decision.chosen is not None
    assert decision.chosen.strategy.processes == "data parallel"
    assert "--data-parallel" in command(decision.chosen)
    zero = next(plan for plan in decision.considered if plan.fits and plan.strategy.processes == "ZeRO-3")
    assert "torchrun --nproc-per-node 2" in command(zero)
    assert "--deepspeed" in command(zero)


def test_dense_weights_are_streamed_only_if_asked_for(llama_70b: ModelSizes) -> None:
    work, machine = make_workload(llama_70b, 32), parse_machine("1x24")
    by_default, dense = decide(work, machine), decide(work, machine, four_bit=False)
    assert by_default.chosen is not None
    assert dense.chosen is not None
    assert by_default.chosen.strategy.four_bit
    assert not dense.chosen.strategy.four_bit
    assert dense.chosen.strategy.streams
    assert "--no-4bit" in describe(by_default)


def test_small_models_stay_as_they_are() -> None:
    work = make_workload(model_sizes("smollm2-135m"), 15, dtype="float32")
    decision = decide(work, parse_machine("cpu", host_gib=8))
    assert decision.chosen is not None
    assert decision.chosen.strategy == Strategy("one process", False, decision.chosen.strategy.micro_batch_tokens)
    assert not decision.chosen.host_training
    assert decision.chosen.training["Python and torch"] == 0.5 * GIB


def test_a_suffix_without_layers_is_planned(llama_8b: ModelSizes) -> None:
    decision = decide(make_workload(llama_8b, 31), parse_machine("1x12"))
    assert decision.chosen is not None
    assert "no layer" in describe(decision)


# what does not fit


def _decided(work: Workload, gpus: str, four_bit: bool | None = None, **settings: Any) -> Decision:
    decision = decide(work, parse_machine(gpus, **settings), four_bit=four_bit)
    assert decision.chosen is None
    return decision


def test_what_does_not_fit_says_by_how_much_and_what_would(llama_70b: ModelSizes) -> None:
    decision = _decided(make_workload(llama_70b, 32), "1x6")
    least = decision.considered[0]
    assert least.shortfall == min(plan.shortfall for plan in decision.considered)
    message = str(refusal(decision))
    assert f"does not fit 1x6, by {least.shortfall / GIB:.2f} GiB" in message
    assert "planned, not measured" in message
    assert "unless on GPUs of 10 GB" in message
    assert decide(make_workload(llama_70b, 32), parse_machine("1x10")).chosen is not None
    assert decide(make_workload(llama_70b, 32), parse_machine("1x9")).chosen is None


def test_remedies_were_tried(llama_70b: ModelSizes) -> None:
    work = make_workload(llama_70b, 32, tokens=65536, dtype="float32")
    decision = _decided(work, "1x8", four_bit=False, host_gib=4)
    assert not any("tokens" in remedy for remedy in decision.remedies)  # fewer would not do
    long = _decided(make_workload(llama_70b, 32, tokens=400_000), "1x12", four_bit=True)
    (fewer,) = [remedy for remedy in long.remedies if "--tokens" in remedy]
    tokens = int(fewer.split()[1])
    assert decide(make_workload(llama_70b, 32, tokens=tokens), parse_machine("1x12"), four_bit=True).chosen is not None
    more = make_workload(llama_70b, 32, tokens=int(tokens * 1.03))
    assert decide(more, parse_machine("1x12"), four_bit=True).chosen is None


def test_quantisation_dtype_and_host_memory_are_remedies(llama_8b: ModelSizes) -> None:
    work = make_workload(llama_8b, 0, dtype="float32")
    decision = _decided(work, "1x6", four_bit=False)
    assert any("--dtype bfloat16" in remedy for remedy in decision.remedies)
    starved = _decided(make_workload(llama_8b, 12), "1x8", host_gib=2)
    assert any("GiB of host memory" in remedy for remedy in starved.remedies)
    cpu = _decided(make_workload(llama_8b, 12), "cpu", four_bit=False, host_gib=3)
    assert any("--load-in-4bit" in remedy or "GiB of memory" in remedy for remedy in cpu.remedies)


# machines


def test_machines() -> None:
    two = parse_machine(" 2x24GB ")
    assert (two.gpus, two.card.memory_gib, two.card.tflops) == (2, 24, CARDS["3090"].tflops)
    assert two.usable / GIB == pytest.approx(23.2)
    assert parse_machine("1xH100").card == CARDS["h100"]
    assert parse_machine("8xa100").card == CARDS["a100-80"]
    assert parse_machine("1x4090", tflops=70.0).card.tflops == 70
    assert parse_machine("cpu").is_cpu
    assert parse_machine("cpu", host_gib=16).usable == 16 * GIB
    assert parse_machine("1x12").usable == 12 * GIB * USABLE
    rates = [parse_machine(f"1x{gib}").card.tflops for gib in (8, 24, 40, 48, 80, 141)]
    assert rates == sorted(rates)


@pytest.mark.parametrize("text", ["", "24", "x24", "0x24", "2x", "2x24x", "2x-24", "1xrtx9999", "1x0", "gpu", "1x2000"])
def test_malformed_machines(text: str) -> None:
    with pytest.raises(InvalidInputError, match="--gpus: expected"):
        parse_machine(text)


@pytest.mark.parametrize("name", ["host_gib", "tflops", "link", "disk"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_speeds_are_positive(name: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match="positive number"):
        parse_machine("1x24", **{name: value})


# the command


def _plan(*arguments: str) -> list[str]:
    return ["plan", "--model", LLAMA_70B, "--layer", "32", *arguments]


def test_command_prints_tables_choice_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_plan("--gpus", "2x24", "--tokens", "4096")) == 0
    out = capsys.readouterr().out
    for part in (
        "memory of a GPU, GiB (planned, not measured)",
        "memory of the host, GiB (planned, not measured)",
        "caching  training",
        " of layers 33 to 79, evenly spread",
        "streamed: the other ",
        "offloaded:",
        "why:",
        "does not fit, by",
        "ZeRO-3 over 2 GPUs",
        "assumptions:",
        "45 TFLOPS",
        "torchrun --nproc-per-node 2 -m cdas_fast.cli train",
        "--data-parallel",
    ):
        assert part in out, part


def test_parts_of_the_table_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_plan("--gpus", "1x24")) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("memory of a GPU"))
    rows = list(itertools.takewhile(lambda line: not line.startswith("  usable"), lines[start + 1 :]))
    training = [float(line.split()[-1]) for line in rows if line.split()[-1] != "-"]
    assert sum(training[:-1]) == pytest.approx(training[-1], abs=0.05)


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(_plan("--gpus", "1x24", "--load-in-4bit", "--json", str(file))) == 0
    content = json.loads(file.read_text())
    plan = content["plan"]
    assert content["label"] == plan["label"] == "planned, not measured"
    assert content["fits"]
    assert plan["peak_bytes"] == pytest.approx(sum(plan["training_bytes"].values()))
    assert plan["peak_bytes"] + content["margin_bytes"] <= plan["usable_bytes"]
    strategy = plan["strategy"]
    assert strategy["resident_layers"] + strategy["streamed_layers"] == content["suffix_layers"] == 47
    assert f"--resident-layers {strategy['resident_layers']}" in plan["command"]
    assert plan["command"] in capsys.readouterr().out
    assert all(each["strategy"]["four_bit"] for each in content["considered"])
    assert content["assumptions"]


def test_what_does_not_fit_has_an_exit_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(_plan("--gpus", "1x6", "--json", str(file))) == DoesNotFitError.exit_code == 7
    out, error = capsys.readouterr()
    assert "nothing fits" in out
    assert "run it" not in out
    assert "does not fit 1x6, by" in error
    content = json.loads(file.read_text())
    assert content["plan"] is None
    assert content["remedies"]


def test_command_options_reach_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = ["--tokens", "2000", "--response-tokens", "300", "--sequence-tokens", "500", "--sequences", "7"]
    options += ["--rank", "4", "--dtype", "float16", "--no-4bit", "--host-memory", "500"]
    options += ["--tflops", "10", "--link", "5", "--disk", "1", "--json", str(file)]
    assert main(_plan("--gpus", "1x80", *options)) == 0
    content = json.loads(file.read_text())
    names = ("tokens", "response_tokens", "sequence_tokens", "sequences", "rank", "dtype")
    assert [content[name] for name in names] == [2000, 300, 500, 7, 4, "float16"]
    assert not content["plan"]["strategy"]["four_bit"]
    assert "--rank 4" in content["plan"]["command"]
    assert any("10 TFLOPS" in line for line in content["assumptions"])


def test_planned_commands_are_ones_that_train_takes() -> None:
    work = make_workload(model_sizes("smollm2-135m"), 15)
    decision = decide(work, parse_machine("cpu", host_gib=8), four_bit=False)
    assert decision.chosen is not None
    words = shlex.split(command(decision.chosen))
    assert words[:2] == ["cdas-fast", "train"]
    added = ["--data", "pairs.parquet", "--output", "out"] if "--data" not in words else []
    parsed = build_parser().parse_args([*words[1:], *added])
    assert (parsed.model, parsed.layer, parsed.device) == ("smollm2-135m", [15], "cpu")
    assert parsed.micro_batch_tokens == decision.chosen.strategy.micro_batch_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", LLAMA_70B, "--gpus", "1x24"], "--layer: expected a decoder layer from 0 to 79, got none"),
        (["--model", LLAMA_70B, "--gpus", "1x24", "--layer", "80"], "--layer: expected"),
        (["--model", LLAMA_70B, "--gpus", "24", "--layer", "32"], "--gpus: expected"),
        (["--model", "no/such-model", "--gpus", "1x24", "--layer", "3"], "Without the hub these are known"),
        (["--model", "./nowhere", "--gpus", "1x24", "--layer", "3"], "a folder with a config.json"),
        (["--model", LLAMA_70B, "--gpus", "1x24", "--layer", "32", "--tokens", "0"], "--tokens: expected"),
        (["--model", LLAMA_70B, "--gpus", "1x24", "--layer", "32", "--dtype", "int8"], "--dtype: expected"),
        (["--model", LLAMA_70B, "--gpus", "1x24", "--layer", "32", "--sequence-tokens", "9999"], "--sequence-tokens"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", _no_hub)
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_paper_s_layer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", LLAMA_70B, "--gpus", "1x24"]) == 2
    assert "The paper takes 32" in capsys.readouterr().err


def test_other_architectures_are_refused() -> None:
    from transformers import GPT2Config

    with pytest.raises(UnsupportedError, match="q_proj"):
        sizes_of(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100), "gpt2")
    from transformers import T5Config

    with pytest.raises(UnsupportedError):
        sizes_of(T5Config(), "t5")


def test_json_of_a_decision_is_json(llama_8b: ModelSizes) -> None:
    decision = decide(make_workload(llama_8b, 12), parse_machine("1x12"))
    assert json.loads(json.dumps(as_json(decision))) == as_json(decision)
