"""The `cdas-fast` command."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from cdas_fast.errors import CDASError, InvalidInputError, expected_got

if TYPE_CHECKING:
    from torch import nn

INTERRUPTED = 130  # what shells use for a command that was interrupted
MODEL_HELP = "smollm2-135m (embedded), a folder, a .gguf file, or a Hugging Face hub id"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 to 8 an error (see `cdas_fast.errors`), 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        options.run(options)
    except CDASError as error:
        if options.debug:
            raise
        print(f"cdas-fast: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if options.debug:
            raise
        can_resume = getattr(options, "can_resume", False)
        hint = f" Go on with: cdas-fast {options.command} ... --resume" if can_resume else ""
        print(f"\ncdas-fast: interrupted; what was finished is kept.{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the interpreter's own last flush)
        return 0
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and all its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="cdas-fast",
        description="Learn, apply and measure steering vectors by Concept Distributed Alignment Search.",
        epilog=_examples(
            "cdas-fast demo",
            "cdas-fast train --model smollm2-135m --data pairs.parquet --layer 15 --output out",
            'cdas-fast generate --model smollm2-135m --vector out --compare "How do I spend a rainy day?"',
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from cdas_fast import __version__

    parser.add_argument("--version", action="version", version=f"cdas_fast {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher, beside LOCAL_RANK
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_data(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_command(commands, "show-config", _show_config, "versions, devices and chosen implementations")
    return parser


def _add_command(commands: Any, name: str, run: Callable[[Any], None], help_: str, *examples: str) -> Any:
    command = commands.add_parser(
        name,
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}.",
        epilog=_examples(*examples) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    command.set_defaults(run=run)
    return command


def _add_model(command: Any) -> None:
    command.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    command.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto: that of the weights")
    command.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if there is one")


def _add_piecemeal(command: Any) -> None:
    command.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="keep the layers' weights in 4 bits (NF4), made at the first use and kept as a packed copy",
    )
    command.add_argument(
        "--resident-layers",
        type=int,
        metavar="K",
        help="keep K layers on the device, and read the others when they are needed; default: all that are needed",
    )
    command.add_argument(
        "--packed", type=Path, metavar="DIR", help="folder of packed copies; default: in the user's cache"
    )


def _add_demo(commands: Any) -> None:
    demo = _add_command(
        commands,
        "demo",
        _demo,
        "train on embedded model and data, steer both ways, write a report",
        "cdas-fast demo",
        "cdas-fast demo --output my-demo --max-new-tokens 80",
    )
    demo.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: demo-output")
    demo.add_argument("--overwrite", action="store_true", help="replace what an earlier demo left in DIR")
    demo.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="length of the answers")


def _add_train(commands: Any) -> None:
    train = _add_command(
        commands,
        "train",
        _train,
        "train steering vectors from a file of contrastive pairs",
        "cdas-fast train --model smollm2-135m --data pairs.parquet --layer 15 --output out",
        "cdas-fast train --model meta-llama/Llama-3.1-8B-Instruct --data pairs.jsonl --layer 12 --output out "
        "--epochs 50 --learning-rate 0.08 --batch-size 16 --dtype bfloat16",
        "cdas-fast train ... --output out --resume    # go on after an interruption",
        "torchrun --nproc-per-node 4 -m cdas_fast.cli train ...    # several concepts, divided among processes",
        "torchrun --nproc-per-node 2 -m cdas_fast.cli train ... --data-parallel    # the rows of each step, divided",
        "torchrun --nproc-per-node 2 -m cdas_fast.cli train ... --deepspeed --load-in-4bit    # the weights as well",
    )
    _add_model(train)
    train.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="F",
        help="parquet, jsonl, json or csv with negative_input, negative_output, positive_input, positive_output, and "
        "optionally concept_id, concept, concept_genre",
    )
    train.add_argument("--validation", type=Path, metavar="F", help="held-out pairs, measured while training")
    train.add_argument("--layer", required=True, type=int, nargs="+", metavar="L", help="decoder layer, counted from 0")
    train.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    train.add_argument(
        "--preset",
        choices=("published", "fast"),
        default="published",
        help="epochs, batch size, learning rate and its schedule, initial direction; `fast` takes a quarter of the "
        "steps. What is given beside it counts. Default: published",
    )
    train.add_argument("--epochs", type=int, metavar="N")
    train.add_argument("--batch-size", type=int, metavar="N", help="pairs per step")
    train.add_argument("--learning-rate", type=float, metavar="X", help="peak rate of AdamW")
    train.add_argument("--schedule", choices=("linear", "cosine"), help="how the rate decays to 0")
    train.add_argument("--warmup-steps", type=int, metavar="N", help="steps over which the rate rises to its peak")
    train.add_argument(
        "--patience",
        type=int,
        metavar="N",
        help="stop when the loss of --validation has not fallen for N evaluations, and keep the best direction",
    )
    train.add_argument("--rank", type=int, default=1, metavar="R", help="rows of the direction")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--reduction", choices=("sequence", "token"), default="sequence", help="how losses are averaged")
    train.add_argument(
        "--directions", choices=("both", "positive", "negative"), default="both", help="which way to train it"
    )
    train.add_argument("--max-output-tokens", type=int, default=128, metavar="N", help="cut responses to N tokens")
    train.add_argument("--max-examples", type=int, metavar="N", help="the first N pairs of each concept")
    train.add_argument("--concept-id", type=int, nargs="+", metavar="ID", help="only these concepts of the file")
    train.add_argument("--no-shuffle", action="store_true", help="take the pairs in file order")
    train.add_argument(
        "--initial-direction",
        metavar="FILE",
        help="a safetensors file with `direction` (R, D), or: random, difference-in-means, principal-direction",
    )
    train.add_argument("--system-prompt", metavar="TEXT", help="system message; default: what the template does")
    train.add_argument("--source-tokens", metavar="TEXT", help="read the source at the last token of this text")
    train.add_argument("--keep-spaces", action="store_true", help="leave spaces before punctuation in prompts")
    train.add_argument(
        "--concepts-together",
        type=int,
        metavar="N",
        help="of several concepts, how many train at a time; default: as many as fill a micro-batch",
    )
    train.add_argument(
        "--activations",
        type=Path,
        metavar="DIR",
        help="keep cached activations there for later runs; default: in the output folder until the run is complete",
    )
    train.add_argument(
        "--recompute", action="store_true", help="run layers twice instead of keeping activations: less memory, slower"
    )
    train.add_argument("--checkpoint-every", type=int, default=10, metavar="N", help="steps between checkpoints")
    train.add_argument("--evaluate-every", type=int, default=1, metavar="N", help="epochs between held-out losses")
    train.add_argument("--resume", action="store_true", help="go on where an interrupted run in DIR stopped")
    train.add_argument(
        "--activation-memory",
        type=float,
        metavar="GIB",
        help="of layers that are read when they are needed, memory for the activations that they keep; the layers for "
        "which it does not suffice run twice. Default: no limit",
    )
    train.add_argument(
        "--offload-activations",
        action="store_true",
        help="of such layers, keep hidden states between those that run twice in host memory (on a CPU: in files)",
    )
    train.add_argument(
        "--micro-batch-tokens", type=int, default=4096, metavar="N", help="tokens that go through the layers at once"
    )
    train.add_argument(
        "--data-parallel",
        action="store_true",
        help="under torchrun: divide the rows of each step among the processes; without it, the concepts",
    )
    train.add_argument(
        "--deepspeed",
        action="store_true",
        help="under torchrun or deepspeed: divide the weights that training needs as well (ZeRO-3), beside the rows of "
        "each step",
    )
    train.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that a process waits for another one before it ends with an error",
    )
    _add_piecemeal(train)
    train.set_defaults(can_resume=True)


def _add_generate(commands: Any) -> None:
    generate = _add_command(
        commands,
        "generate",
        _generate,
        "answer prompts, steered or not",
        'cdas-fast generate --model smollm2-135m --vector out --toward positive "Tell me about trains."',
        'cdas-fast generate --model smollm2-135m --vector out --compare "Tell me about trains."',
    )
    _add_model(generate)
    _add_piecemeal(generate)
    generate.add_argument("--vector", metavar="DIR", help="folder or hub repository of a steering vector")
    generate.add_argument("--toward", choices=("positive", "negative", "none"), default="positive")
    generate.add_argument("--compare", action="store_true", help="unsteered, positive and negative, one after another")
    generate.add_argument("--multiplier", type=float, default=1.0, metavar="X", help="times the factor of the data")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.add_argument("prompt", nargs="+", metavar="PROMPT", help="the user's text; - reads it from standard input")


def _add_evaluate(commands: Any) -> None:
    evaluate = _add_command(
        commands,
        "evaluate",
        _evaluate,
        "measure the divergence that steering leaves on held-out pairs",
        "cdas-fast evaluate --model smollm2-135m --vector out --data held_out.parquet",
    )
    _add_model(evaluate)
    _add_piecemeal(evaluate)
    evaluate.add_argument("--vector", required=True, nargs="+", metavar="DIR", help="one or several steering vectors")
    evaluate.add_argument("--data", required=True, type=Path, metavar="F", help="pairs not trained on")
    evaluate.add_argument("--concept-id", type=int, metavar="ID", help="only this concept of the file")
    evaluate.add_argument("--multiplier", type=float, default=1.0, metavar="X", help="times the factor of the data")
    evaluate.add_argument("--reduction", choices=("sequence", "token"), default="sequence", help="how it is averaged")
    evaluate.add_argument("--max-output-tokens", type=int, default=128, metavar="N", help="cut responses to N tokens")


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="make contrastive pairs", description="Make contrastive pairs.")
    kinds = data.add_subparsers(dest="kind", metavar="KIND", required=True)
    contrast = _add_command(
        kinds,
        "contrast",
        _contrast,
        "make pairs for a concept by asking a model each instruction with the concept and without",
        'cdas-fast data contrast --concept "the ocean" --instructions list.txt --model smollm2-135m '
        "--output pairs.jsonl",
        'cdas-fast data contrast --concept "the ocean" --instructions list.txt --endpoint http://localhost:8000/v1 '
        "--endpoint-model NAME --output pairs.jsonl    # key in OPENAI_API_KEY",
    )
    contrast.add_argument("--concept", required=True, metavar="TEXT")
    contrast.add_argument(
        "--instructions", required=True, type=Path, metavar="F", help="a line each, or a table with `instruction`"
    )
    contrast.add_argument("--output", required=True, type=Path, metavar="F", help="jsonl, parquet, json or csv")
    contrast.add_argument("--overwrite", action="store_true", help="replace the output file")
    who = contrast.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", metavar="M", help=MODEL_HELP)
    who.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible API, often ending in /v1")
    contrast.add_argument("--endpoint-model", metavar="NAME", help="name of the model at the endpoint")
    contrast.add_argument("--keep", metavar="REGEX", help="found in the positive answer, not in the negative one")
    contrast.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    contrast.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    contrast.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    contrast.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at a time for a local model")
    contrast.add_argument("--seed", type=int, default=0, metavar="N")
    contrast.add_argument("--concept-id", type=int, default=0, metavar="ID")
    contrast.add_argument("--concept-genre", metavar="TEXT")
    contrast.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one request")
    contrast.add_argument("--max-retries", type=int, default=5, metavar="N")
    contrast.add_argument("--concurrency", type=int, default=4, metavar="N", help="requests at a time")


def _add_plan(commands: Any) -> None:
    plan = _add_command(
        commands,
        "plan",
        _plan,
        "say what of a training run fits where, from the config of a model alone: nothing is downloaded but that",
        "cdas-fast plan --model meta-llama/Llama-3.1-70B-Instruct --layer 32 --gpus 2x24 --tokens 4096",
        "cdas-fast plan --model google/gemma-2-9b-it --layer 20 --gpus 1x4090 --host-memory 32 --json plan.json",
        "cdas-fast plan --model smollm2-135m --layer 15 --gpus cpu --no-4bit",
    )
    plan.add_argument("--model", required=True, metavar="M", help="smollm2-135m, a folder, or a Hugging Face hub id")
    plan.add_argument("--layer", type=int, metavar="L", help="decoder layer, counted from 0")
    plan.add_argument(
        "--gpus", required=True, metavar="G", help="COUNTxGB such as 2x24, COUNTxCARD such as 1xa100-80, or cpu"
    )
    plan.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="of a step beyond the shared prefix; default: 4096"
    )
    plan.add_argument("--response-tokens", type=int, metavar="N", help="of these; default: half")
    plan.add_argument(
        "--sequence-tokens", type=int, metavar="N", help="of the longest sequence; default: 256, or --tokens if fewer"
    )
    plan.add_argument(
        "--sequences", type=int, default=256, metavar="N", help="two a pair, for the size of caches; default: 256"
    )
    plan.add_argument("--rank", type=int, default=1, metavar="R", help="rows of the direction")
    plan.add_argument("--dtype", default="bfloat16", metavar="D", help="bfloat16 (default), float16 or float32")
    bits = plan.add_mutually_exclusive_group()
    bits.add_argument(
        "--load-in-4bit", action="store_true", default=None, help="quantise the layers; default: if it is faster"
    )
    bits.add_argument("--no-4bit", action="store_false", dest="load_in_4bit", help="never quantise them")
    plan.add_argument(
        "--host-memory", type=float, metavar="GIB", help="of the machine; default: enough; cpu: this one's"
    )
    plan.add_argument("--tflops", type=float, metavar="X", help="of a GPU in bfloat16; default: assumed by its name")
    plan.add_argument("--link", type=float, metavar="GB/S", help="from host memory to a GPU; default: 25, assumed")
    plan.add_argument("--disk", type=float, metavar="GB/S", help="default: 3.5, assumed")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")


def _add_bench(commands: Any) -> None:
    description = "Measure an op or a training step: time, memory and error, side by side with the alternatives."
    bench = commands.add_parser(
        "bench", help="measure an op or a training step beside the alternatives", description=description
    )
    subjects = bench.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    loss = _add_command(
        subjects,
        "loss",
        _bench_loss,
        "measure the divergence of two linear heads against plain torch, torch.compile, Liger and bare matrix products",
        "cdas-fast bench loss",
        "cdas-fast bench loss --shape all --dtype bfloat16 --output bench-loss",
        "cdas-fast bench loss --shape 128x1024x32000 --variants cpp eager --repeats 20 --threads 2",
    )
    loss.add_argument(
        "--shape",
        nargs="+",
        default=["smollm2"],
        metavar="S",
        help="smollm2 (default), wide-2304, llama-3.1-8b, gemma-2-2b, llama-3.1-70b, all, or ROWSxWIDTHxVOCABULARY",
    )
    loss.add_argument("--rows", type=int, metavar="N", help="rows of each shape, instead of its own number")
    loss.add_argument("--divergence", default="jsd", metavar="D", help="jsd (default), forward_kl or reverse_kl")
    loss.add_argument(
        "--variants",
        nargs="+",
        metavar="V",
        help="of cpp, triton, reference (ours), eager, chunked, compile (plain torch), liger, liger-triton; the matrix "
        "products (gemms) always run; default: all that run on the device",
    )
    interchange = _add_command(
        subjects,
        "interchange",
        _bench_interchange,
        "measure the intervention, forward and backward, against the expression that one writes in torch",
        "cdas-fast bench interchange",
        "cdas-fast bench interchange --shape 16x512x4096 --dtype bfloat16 --output bench-interchange",
    )
    interchange.add_argument(
        "--shape",
        nargs="+",
        default=["all"],
        metavar="S",
        help="BATCHxPOSITIONSxWIDTH; default: 32x190x576 and 8x256x8192",
    )
    interchange.add_argument(
        "--variants", nargs="+", metavar="V", help="of cpp, triton, reference (ours); eager always runs; default: all"
    )
    train = _add_command(
        subjects,
        "train",
        _bench_train,
        "measure a training step against the published scheme and against its bare matrix products",
        "cdas-fast bench train",
        "cdas-fast bench train --data pairs.parquet --dtype float32 --repeats 3 --output bench-train",
        "cdas-fast bench train --model Qwen/Qwen2.5-0.5B-Instruct --layer 12 --batch-size 4 --variants engine",
    )
    train.add_argument("--model", default="smollm2-135m", metavar="M", help=f"{MODEL_HELP}; default: smollm2-135m")
    train.add_argument(
        "--data", type=Path, metavar="F", help="pairs, of several concepts the first; default: those of the demo"
    )
    train.add_argument("--layer", type=int, default=15, metavar="L", help="decoder layer, counted from 0; default: 15")
    train.add_argument("--batch-size", type=int, default=8, metavar="N", help="pairs per step; default: 8")
    train.add_argument(
        "--max-output-tokens", type=int, default=128, metavar="N", help="cut responses to N tokens; default: 128"
    )
    train.add_argument("--max-examples", type=int, metavar="N", help="the first N pairs")
    train.add_argument(
        "--epochs", type=int, default=18, metavar="N", help="of the whole run that is estimated; default: 18"
    )
    train.add_argument(
        "--reduction",
        choices=("token", "sequence"),
        default="token",
        help="how losses are averaged; default: token, as the published code does",
    )
    train.add_argument(
        "--variants",
        nargs="+",
        metavar="V",
        help="of plain (the published scheme), engine (ours); the matrix products (floor) always run; default: all",
    )
    for command, repeats in ((loss, 10), (interchange, 30), (train, 5)):
        command.add_argument(
            "--dtype",
            nargs="+",
            default=["bfloat16", "float32"],
            metavar="D",
            help="bfloat16, float32, float16; default: bfloat16 float32",
        )
        command.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if there is one")
        command.add_argument(
            "--repeats",
            type=int,
            default=repeats,
            metavar="K",
            help=f"rounds, all variants in each; default: {repeats}",
        )
        command.add_argument("--threads", type=int, metavar="N", help="of torch; default: torch's own number")
        command.add_argument(
            "--output", type=Path, metavar="DIR", help="write table.txt, results.json and plot.png there"
        )
        command.add_argument("--overwrite", action="store_true", help="replace an earlier report in DIR")


def _demo(options: Any) -> None:
    from cdas_fast.demo import run_demo

    run_demo(options.output, overwrite=options.overwrite, max_new_tokens=options.max_new_tokens)


def _train(options: Any) -> None:
    import torch

    from cdas_fast.data.pairs import ContrastivePairs
    from cdas_fast.distributed.process_group import ProcessGroup
    from cdas_fast.distributed.processes import Processes
    from cdas_fast.distributed.zero3 import require_deepspeed
    from cdas_fast.models.loading import resolve_device
    from cdas_fast.training import TrainingConfig, train
    from cdas_fast.training.summary import describe_training

    governed = ("epochs", "batch_size", "learning_rate", "schedule", "warmup_steps")
    given = {name: getattr(options, name) for name in governed if getattr(options, name) is not None}
    if options.initial_direction is not None:
        given["initial_direction"] = _initial_direction(options.initial_direction)
    config = TrainingConfig.preset(
        options.preset,
        **given,
        layer=options.layer[0] if len(options.layer) == 1 else options.layer,
        rank=options.rank,
        patience=options.patience,
        reduction=options.reduction,
        directions=options.directions,
        max_output_tokens=options.max_output_tokens,
        max_examples=options.max_examples,
        shuffle=not options.no_shuffle,
        seed=options.seed,
        system_prompt=options.system_prompt,
        source_tokens=options.source_tokens,
        clean_spaces=not options.keep_spaces,
        concepts_together=options.concepts_together,
        recompute=options.recompute,
        micro_batch_tokens=options.micro_batch_tokens,
        offload_activations=options.offload_activations,
        activation_bytes=None if options.activation_memory is None else int(options.activation_memory * 2**30),
        checkpoint_every=options.checkpoint_every,
        evaluate_every=options.evaluate_every,
    )
    pairs = ContrastivePairs.from_file(options.data).select(concept_ids=options.concept_id)
    validation = None if options.validation is None else ContrastivePairs.from_file(options.validation)
    processes = Processes.from_environment()
    if processes.count > 1 and options.device is None and torch.cuda.is_available():
        options.device = f"cuda:{processes.local_rank}"
    together: AbstractContextManager[ProcessGroup | None] = nullcontext()
    if options.deepspeed:
        require_deepspeed()
        if options.resident_layers is not None:
            wanted = "none, with --deepspeed: all layers are divided"
            raise InvalidInputError(expected_got("--resident-layers", wanted, options.resident_layers))
        options.resident_layers = 0
    if options.data_parallel or options.deepspeed:
        on_cuda = resolve_device(options.device).type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if options.deepspeed and on_cuda else "gloo"
        together = ProcessGroup.join(processes, options.timeout, backend)
    with together as group:
        model, tokenizer = _load(options)
        result = train(
            model,
            tokenizer,
            pairs,
            config,
            validation=validation,
            output_dir=options.output,
            activations_dir=options.activations,
            resume=options.resume,
            progress=processes.rank == 0,
            processes=None if group else processes,
            group=group,
            deepspeed=options.deepspeed,
        )
    if group is not None and not group.is_first:
        return
    print(describe_training(result))
    if result.failed:
        failed = "\n".join(f"concept {concept_id}: {error}" for concept_id, error in result.failed.items())
        raise CDASError(f"{failed}\nThe other concepts are trained; --resume tries these again.")
    if len(pairs.concept_ids) == 1:
        print(f'\nTry it: cdas-fast generate --model {options.model} --vector {options.output} --compare "..."')


def _generate(options: Any) -> None:
    from transformers import TextStreamer

    from cdas_fast.steering import SteeringVector, generate

    vector = None
    if options.vector is not None:
        vector = SteeringVector.from_pretrained(options.vector)
    elif options.compare or options.toward != "none":
        remedy = "Give one, or ask for --toward none."
        raise InvalidInputError(expected_got("--vector", "a folder or hub repository", "none", remedy))
    model, tokenizer = _load(options)
    ways: list[tuple[str, Any]] = [("unsteered", None)]
    if options.compare:
        ways += [("positive", "positive"), ("negative", "negative")]
    elif options.toward != "none":
        ways = [(options.toward, options.toward)]
    for prompt in (sys.stdin.read() if prompt == "-" else prompt for prompt in options.prompt):
        for name, toward in ways:
            if len(ways) > 1 or len(options.prompt) > 1:
                print(_heading(f"{name}: {textwrap.shorten(prompt, 60, placeholder=' ...')}"))
            generate(
                model,
                tokenizer,
                [prompt],
                None if toward is None else vector,
                toward=toward or "positive",
                multiplier=options.multiplier,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )


def _evaluate(options: Any) -> None:
    from cdas_fast.data.pairs import ContrastivePairs
    from cdas_fast.evaluation import divergence_table, held_out_divergence
    from cdas_fast.steering import SteeringVector

    vectors = {str(place): SteeringVector.from_pretrained(place) for place in options.vector}
    pairs = ContrastivePairs.from_file(options.data)
    if options.concept_id is not None:
        pairs = pairs.of_concept(options.concept_id)
    model, tokenizer = _load(options)
    rows = held_out_divergence(
        model,
        tokenizer,
        pairs,
        vectors,
        multiplier=options.multiplier,
        reduction=options.reduction,
        max_output_tokens=options.max_output_tokens,
    )
    print(divergence_table(rows))


def _contrast(options: Any) -> None:
    from cdas_fast.data.contrast import EndpointResponder, LocalResponder, Responder, build_contrast, read_instructions
    from cdas_fast.models import load_model

    if options.output.exists() and not options.overwrite:
        remedy = "Choose another name or pass --overwrite."
        raise InvalidInputError(expected_got(str(options.output), "a new file", "an existing one", remedy))
    try:
        keep = None if options.keep is None else re.compile(options.keep)
    except re.error as error:
        raise InvalidInputError(expected_got("--keep", "a regular expression", f"{options.keep!r}: {error}")) from error
    instructions = read_instructions(options.instructions)
    length = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    responder: Responder
    if options.endpoint is not None:
        if options.endpoint_model is None:
            raise InvalidInputError(expected_got("--endpoint-model", "the model's name at the endpoint", "none"))
        responder = EndpointResponder(
            options.endpoint,
            options.endpoint_model,
            os.environ.get("OPENAI_API_KEY"),
            timeout=options.timeout,
            max_retries=options.max_retries,
            concurrency=options.concurrency,
            **length,
        )
    else:
        model, tokenizer = load_model(options.model)
        responder = LocalResponder(
            model,  # type: ignore[arg-type]
            tokenizer,
            batch_size=options.batch_size,
            seed=options.seed,
            repetition_penalty=options.repetition_penalty,
            **length,
        )
    checkpoint = options.output.with_name(f"{options.output.name}.answers.jsonl")
    pairs = build_contrast(
        options.concept,
        instructions,
        responder,
        keep=keep,
        concept_id=options.concept_id,
        concept_genre=options.concept_genre,
        checkpoint=checkpoint,
    )
    pairs.to_file(options.output, overwrite=options.overwrite)
    checkpoint.unlink(missing_ok=True)
    print(f"{len(pairs)} pairs written to {options.output}")


def _plan(options: Any) -> None:
    from cdas_fast.distributed.hardware import parse_machine
    from cdas_fast.distributed.model_sizes import model_sizes
    from cdas_fast.distributed.plan_report import as_json, describe, refusal
    from cdas_fast.distributed.plan_workload import make_workload
    from cdas_fast.distributed.planner import decide
    from cdas_fast.storage import write_json

    speeds = {name: getattr(options, name) for name in ("tflops", "link", "disk")}
    machine = parse_machine(options.gpus, host_gib=options.host_memory, **speeds)
    names = ("tokens", "response_tokens", "sequence_tokens", "sequences", "rank", "dtype")
    numbers = {name: getattr(options, name) for name in names}
    workload = make_workload(model_sizes(options.model), options.layer, **numbers)
    decision = decide(workload, machine, four_bit=options.load_in_4bit)
    print(describe(decision))
    if options.json is not None:
        write_json(options.json, as_json(decision))
    if decision.chosen is None:
        raise refusal(decision)


def _bench_loss(options: Any) -> None:
    from dataclasses import replace

    from cdas_fast.benchmark.loss import SHAPES, bench_loss, parse_shape

    shapes = [*SHAPES.values()] if options.shape == ["all"] else [parse_shape(text) for text in options.shape]
    if options.rows is not None:
        if options.rows < 1:
            raise InvalidInputError(expected_got("--rows", "a whole number of at least 1", options.rows))
        shapes = [replace(shape, rows=options.rows) for shape in shapes]
    _bench(options, bench_loss, shapes, divergence=options.divergence)


def _bench_interchange(options: Any) -> None:
    from cdas_fast.benchmark.intervention import SHAPES, bench_interchange, parse_shape

    shapes = [*SHAPES.values()] if options.shape == ["all"] else [parse_shape(text) for text in options.shape]
    _bench(options, bench_interchange, shapes)


def _bench_train(options: Any) -> None:
    from cdas_fast.benchmark.training import bench_train

    names = ("data", "layer", "batch_size", "max_output_tokens", "max_examples", "epochs", "reduction")
    _bench(options, bench_train, options.model, **{name: getattr(options, name) for name in names})


def _bench(options: Any, run: Callable[..., Any], problems: Any, **settings: Any) -> None:
    from cdas_fast.benchmark.report import Output, shown

    output = None if options.output is None else Output(options.output, options.overwrite)
    report = run(
        problems,
        dtypes=options.dtype,
        device=options.device,
        variants=options.variants,
        repeats=options.repeats,
        threads=options.threads,
        watch=shown(output),
        **settings,
    )
    print(f"\n{report.footer()}")
    if output is not None:
        print(f"\n{output.write(report)}")
    if all(comparison.is_empty for comparison in report.comparisons):
        raise CDASError("nothing was measured; the table says why")


def _show_config(options: Any) -> None:
    from cdas_fast.environment import show_config

    print(show_config())


def _load(options: Any) -> tuple[nn.Module, Any]:
    from cdas_fast.models import load_model

    return load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        load_in_4bit=options.load_in_4bit,
        resident_layers=options.resident_layers,
        packed_dir=options.packed,
    )


def _initial_direction(argument: str) -> Any:
    if argument in ("random", "difference-in-means", "principal-direction"):
        return argument
    from cdas_fast.storage import read_tensors

    tensors = read_tensors(argument)
    if "direction" not in tensors:
        names = ", ".join(tensors) or "none"
        raise InvalidInputError(expected_got(argument, "a tensor named direction", f"tensors {names}"))
    return tensors["direction"]


def _heading(text: str) -> str:
    return f"\n== {text} {'=' * max(0, 74 - len(text))}"


def _examples(*lines: str) -> str:
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
