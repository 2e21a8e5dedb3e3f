"""What the processes of test_zero3.py do: each runs the same jobs as the others, and leaves its results in a file."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PAIRS, tiny_config
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import cdas_fast
from cdas_fast.distributed import zero3
from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.distributed.processes import Processes
from cdas_fast.distributed.zero3 import NotGatheredError, ZeroEngine
from cdas_fast.errors import ProcessGroupError
from cdas_fast.models.packed import Rows, make_runner
from cdas_fast.models.skeleton import layer_weights
from cdas_fast.models.structure import inspect_decoder

Job = tuple[str, dict[str, Any]]  # a function of this module, and its keyword arguments

LAYER = 1  # the intervened one of all jobs


def launch(folder: Path, count: int, jobs: Sequence[Job], seconds: float = 240.0) -> list[list[Any]]:
    """The results of the jobs in each of `count` processes; fails with what they wrote if one of them does."""
    processes = started(folder, count, jobs)
    written = [finish(process, seconds) for process in processes]
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"process {rank} of {count}:\n{written[rank]}"
    return [result_of(folder, rank) for rank in range(count)]


def started(folder: Path, count: int, jobs: Sequence[Job]) -> list[subprocess.Popen[str]]:
    """Processes that run the jobs and leave their results in the folder."""
    folder.mkdir(parents=True)
    (folder / "jobs").write_bytes(pickle.dumps(list(jobs)))
    port = free_port()
    return [start(rank, count, port, [__file__, str(folder)]) for rank in range(count)]


def result_of(folder: Path, rank: int) -> list[Any]:
    """What a process found, for each job."""
    found: list[Any] = pickle.loads((folder / str(rank)).read_bytes())
    return found


def start(rank: int, count: int, port: int, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """A Python process as `torchrun` would start it, on a CPU."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = {name: str(value) for name, value in places.items()}
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """What the process wrote, once it has ended; killed if that takes too long."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"{process.communicate()[0]}\nkilled after {seconds:.0f} seconds"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def train_on(
    group: ProcessGroup | None,
    folder: str,
    packed: str,
    *,
    output: str | None = None,
    callback: Callable[[Any], None] | None = None,
    dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = True,
    pairs: int = len(PAIRS),
    concepts: int = 1,
    held_out: bool = False,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Losses, bytes of weights after each step, and the vector; of the whole model by itself, if there is no group."""
    model, tokenizer = cdas_fast.load_model(
        folder,
        dtype=dtype,
        device="cpu",
        load_in_4bit=load_in_4bit,
        resident_layers=0 if group else None,
        packed_dir=packed,
    )
    losses, nbytes = [], []

    def note(info: Any) -> None:
        losses.append((info.record.loss, info.record.held_out_loss))
        nbytes.append(weight_bytes(model))
        if callback is not None:
            callback(info)

    result = cdas_fast.train(
        model,
        tokenizer,
        cdas_fast.ContrastivePairs(
            replace(pair, concept_id=number % concepts) for number, pair in enumerate([*PAIRS][:pairs])
        ),
        tiny_config(**{"layer": LAYER, "epochs": 2, **settings}),
        validation=PAIRS if held_out else None,
        output_dir=output,
        resume=resume,
        callback=note,
        progress=False,
        group=group,
        deepspeed=group is not None,
    )
    directions = torch.stack([concept.vector.direction for concept in result.concepts.values()])
    return {"losses": losses, "bytes": nbytes, "direction": directions}


def weight_bytes(model: Any) -> int:
    """Memory for weights in this process, whoever holds them; that of one dense weight at a time apart."""
    parameters = [*model.parameters()]
    tensors = [*parameters, *model.buffers()]
    tensors += [each.ds_tensor for each in parameters if getattr(each, "ds_tensor", None) is not None]
    weights = layer_weights(model)
    if weights is not None:
        tensors += [*weights._kept.values(), *(slot.data for slot in weights._ring)]
    storages = [each.untyped_storage() for each in tensors if not each.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def trained(group: ProcessGroup, *, keeping: bool = False, **arguments: Any) -> dict[str, Any]:
    """`train_on`, and what was alive: layers after each forward pass, layers and bytes after each step."""
    with watched() as seen, keeping_weights() if keeping else nullcontext():
        return {**train_on(group, **arguments), **seen}


@contextmanager
def watched() -> Iterator[dict[str, list[Any]]]:
    """Look at the memory behind weights, not at what DeepSpeed says of them alone."""
    memory: dict[str, StorageWeakRef] = {}
    seen: dict[str, list[Any]] = {"live": [], "left": [], "gathered": []}
    gathered_bytes, run, rest = zero3.gathered_bytes, ZeroEngine.run, ZeroEngine.rest

    def note(parameter: Any, nbytes: int, what: str) -> Tensor:
        data = gathered_bytes(parameter, nbytes, what)
        memory[what] = StorageWeakRef(data.untyped_storage())
        return data

    def forward(self: ZeroEngine, *arguments: Any) -> Tensor:
        result = run(self, *arguments)
        gathered = {f"layer {layer}" for layer in self.live_layers}
        seen["live"].append(len(still_there(memory, len(gathered) + 1) - {"the head"} | gathered))
        return result

    def end(self: ZeroEngine) -> None:
        rest(self)
        seen["left"].append(still_there(memory, 0))
        seen["gathered"].append(self.nbytes.gathered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3, "gathered_bytes", note)
        patch.setattr(ZeroEngine, "run", forward)
        patch.setattr(ZeroEngine, "rest", end)
        yield seen


def still_there(memory: dict[str, StorageWeakRef], enough: int) -> set[str]:
    """What memory has not been given back. Threads of gloo may hold on to what they brought for another moment."""
    for _ in range(50):
        there = {what for what, reference in memory.items() if not reference.expired()}
        if len(there) <= enough:
            break
        time.sleep(0.01)
    return there


@contextmanager
def keeping_weights() -> Iterator[None]:
    """Let linear maps do as bitsandbytes' `MatMul4Bit`: keep the weight for the backward pass."""
    ops: Any = importlib.import_module("cdas_fast.ops.handle_linear")

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, handle: Any, bias: Tensor | None) -> Tensor:
            ctx.weight = handle.dense(x.dtype)
            return torch.nn.functional.linear(x, ctx.weight, bias)

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
            return grad_out @ ctx.weight, None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_HandleLinear", Keeping)
        yield


def taken_apart(group: ProcessGroup, *, folder: str, packed: str, load_in_4bit: bool, packing: Any) -> dict[str, Any]:
    """What becomes of a model's weights while there is an engine, and after that."""
    model, _ = cdas_fast.load_model(
        folder, dtype=torch.float32, device="cpu", load_in_4bit=load_in_4bit, resident_layers=0, packed_dir=packed
    )
    decoder, weights = inspect_decoder(model), layer_weights(model)
    assert weights is not None
    runner = make_runner(decoder, (1, 5, 7), packing)
    rows, hidden = Rows((6, 3), 3), torch.randn(9, decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before, head = runner.suffix(LAYER, hidden, rows), decoder.head.weight.clone()
    engine = ZeroEngine(decoder, runner, LAYER, group)
    parameters: list[Any] = engine.parameters
    found: dict[str, Any] = {
        "dtypes": {parameter.dtype for parameter in parameters},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "bytes": engine.nbytes,
    }
    try:
        decoder.layers[LAYER + 1].get_submodule("mlp.down_proj")(torch.zeros(1, 48))  # by itself, not by its layer
    except NotGatheredError as error:
        found["error"] = str(error)
    same = []
    for number, parameter in zip(engine.numbers, parameters[:-1], strict=True):
        parameter.all_gather()
        layout = weights.layout(number)
        stored, there = (torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2))
        layout.read_into(stored)
        for name in layout.matrices:  # between the pieces lies what happened to be in memory
            for key, piece in layout.tensors(parameter.data.view(torch.uint8), name).items():
                layout.tensors(there, name)[key].copy_(piece)
        same.append(torch.equal(stored, there))
        parameter.partition()
    found["same bytes"] = same
    with torch.no_grad():
        inside = engine.run(hidden, lambda each: runner.suffix(LAYER, each, rows), lambda final, _: final)
    engine.rest()
    engine.close()
    with torch.no_grad():
        after = runner.suffix(LAYER, hidden, rows)
    found["same results"] = torch.equal(before, inside), torch.equal(before, after)
    found["same head"] = (
        torch.equal(head, decoder.head.weight),
        torch.equal(head, model.get_submodule("lm_head").get_parameter("weight")),
    )
    found["same names"] = [name for name, _ in model.named_parameters()] == names
    left = {name for module in model.modules() for name in vars(module) if name.startswith(("ds_", "_z3", "pre_bwd"))}
    found["left behind"] = left | {type(module._parameters).__name__ for module in model.modules()} - {"dict"}
    return found


def peak(group: ProcessGroup, *, folder: str) -> dict[str, Any]:
    """Resident memory that dividing weights takes at most, beside what it was before."""
    model, _ = cdas_fast.load_model(folder, dtype=torch.float32, device="cpu", resident_layers=0)
    decoder = inspect_decoder(model)
    runner = make_runner(decoder, (), "padded")
    engine = ZeroEngine(decoder, runner, decoder.num_layers - 2, group)  # imports and buffers of the first use
    engine.close()
    weights = layer_weights(model)
    assert weights is not None
    weights.release()
    Path("/proc/self/clear_refs").write_text("5")
    before = _kibibytes("VmRSS")
    engine = ZeroEngine(decoder, runner, 0, group)
    most = _kibibytes("VmHWM") - before
    found = {"peak": most * 1024, "layer": weights.layout(1).nbytes, "bytes": engine.nbytes}
    engine.close()
    return found


def _kibibytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


def deserted(group: ProcessGroup, **arguments: Any) -> str:
    """The error of a process whose neighbour ends after the second step of a run."""

    def leave(info: Any) -> None:
        if info.record.step == 2 and not group.is_first:
            os._exit(9)

    try:
        train_on(group, callback=leave, **arguments)
    except ProcessGroupError as error:
        return str(error)
    return "none"


def main(folder: Path) -> None:
    """Run the jobs of a folder together with the other processes."""
    torch.set_num_threads(1)
    jobs: list[Job] = pickle.loads((folder / "jobs").read_bytes())
    processes = Processes.from_environment()
    with ProcessGroup.join(processes, 60.0) as group:
        results = [globals()[name](group, **arguments) for name, arguments in jobs]
        (folder / str(processes.rank)).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
