"""ZeRO-3 of DeepSpeed for the layers of a suffix and the head: each of N processes keeps 1/N of their weights.

    files --read--> bytes of a layer, flat --partition--> 1/N of them in each process
    forward and backward pass: 1/N of a layer --gather--> its bytes --dense--> (O, I), let go when the layer is done

A layer is one flat parameter, and so one collective. It holds whatever bytes the weights are stored as, in 4 bits or
not, and goes by the name of bfloat16 because DeepSpeed neither converts that nor refuses it. The model's own forward
pass runs the layers; DeepSpeed's hooks on them gather and let go. All parameters are frozen: the direction is a leaf
outside, whose gradient comes through hidden states.

`deepspeed.initialize` has no mode for this. Without an optimizer it makes an engine for inference, whose backward pass
fails, and an optimizer needs a parameter to be trained. What lies beneath that engine, `DeepSpeedZeRoOffload`, has all
the hooks and is taken as it is.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from cdas_fast.distributed.process_group import ProcessGroup
from cdas_fast.errors import CDASError, InvalidInputError, MissingDependencyError, expected_got
from cdas_fast.models.handle_linear import HandleLinear
from cdas_fast.models.layer_weights import Handle, LayerWeights, Layout, Scratch
from cdas_fast.models.packed import Runner
from cdas_fast.models.skeleton import drop_embedding, drop_head, layer_weights
from cdas_fast.models.structure import Decoder, Head

STORAGE = torch.bfloat16  # what the bytes are passed off as
FLAT = "flat_weights"  # of a layer, and of the head


class NotGatheredError(CDASError, RuntimeError):
    """Weights were asked for while other processes hold most of them."""


def require_deepspeed() -> None:
    """Raise `MissingDependencyError` unless deepspeed is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(
            "ZeRO-3 is DeepSpeed's: install the extra with pip install 'cdas_fast[deepspeed]', or train without it"
        )


def partitionable(model: nn.Module) -> LayerWeights:
    """The weights of a model that can be partitioned.

    Raises:
        InvalidInputError: its layers hold their weights themselves.
        MissingDependencyError: no deepspeed.
    """
    require_deepspeed()
    weights = layer_weights(model)
    if weights is None:
        wanted = "one whose layers are read when they are needed"
        remedy = "Load it by name, with load_in_4bit=True or resident_layers=0."
        raise InvalidInputError(expected_got("model", wanted, "one that is in memory", remedy))
    return weights


class PartitionedWeights:
    """Linear weights of layers whose bytes are partitioned: what `LayerWeights` is of others, for their handles."""

    def __init__(self, device: torch.device) -> None:
        self._parts: dict[int, tuple[nn.Parameter, Layout]] = {}
        self._scratch = Scratch(device)

    def add(self, layer: int, parameter: nn.Parameter, layout: Layout) -> None:
        """Let a parameter be the bytes of a layer."""
        self._parts[layer] = parameter, layout

    def dense(self, layer: int, name: str, dtype: torch.dtype) -> Tensor:
        """A weight (O, I) in `dtype`, of what is gathered now. For reading until the next call at most.

        Raises:
            NotGatheredError: the layer is not.
        """
        parameter, layout = self._parts[layer]
        matrix = layout.matrices[name]
        tensors = layout.tensors(gathered_bytes(parameter, layout.nbytes, f"layer {layer}"), name)
        if matrix.is_dense(dtype):
            return tensors["weight"]
        weight = self._scratch.room(matrix.shape, dtype)
        matrix.fill(weight, tensors)
        return weight


def gathered_bytes(parameter: nn.Parameter, nbytes: int, what: str) -> Tensor:
    """The bytes of a flat parameter, (nbytes,) uint8.

    Raises:
        NotGatheredError: they are not all there; the message names `what` they are.
    """
    status = parameter.ds_status.name  # type: ignore[attr-defined]
    if status != "AVAILABLE" or parameter.data.nbytes != nbytes:
        got = f"{parameter.data.nbytes} of {nbytes} bytes, {status}"
        raise NotGatheredError(expected_got(f"weights of {what}", "to be gathered", got, "Run them by the engine."))
    return parameter.data.view(torch.uint8)


class _Suffix(nn.Module):
    """What DeepSpeed knows of the model. The model itself runs the layers, within `finals`."""

    def __init__(self, layers: Sequence[nn.Module], head: _ZeroHead) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), head

    def forward(
        self, hidden: Tensor, finals: Callable[[Tensor], Tensor], losses: Callable[[Tensor, Head], Tensor]
    ) -> Tensor:
        losses_of_tokens: Tensor = self.head(finals(hidden), losses=losses)
        return losses_of_tokens


class _ZeroHead(nn.Module):
    """The head's weight as a flat parameter, there while `losses` makes values and gradient rows at once."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.like, self.shape = head, head.weight.shape
        self.dtype, self.nbytes = head.weight.dtype, head.weight.nbytes

    def forward(self, final: Tensor, losses: Callable[[Tensor, Head], Tensor]) -> Tensor:
        data = gathered_bytes(getattr(self, FLAT), self.nbytes, "the head")
        return losses(final, replace(self.like, weight=data.view(self.dtype).view(self.shape)))


@dataclass(frozen=True)
class Bytes:
    """Weights of layers and head in this process."""

    whole: int  # of all processes together
    kept: int  # partitions
    gathered: int  # beside those, now


class ZeroEngine:
    """An `Engine` whose layers beyond one, and whose head, are partitioned among the processes of a group.

    While it exists, a pass through the layers beyond `layer` is one of all processes, and neither embedding nor head
    are in the model. `close` makes the model what it was.

    Args:
        decoder: of a model whose layers do not hold their linear weights.
        runner: of the passes to come; it takes up the prefix now.
        layer: the last one that is not partitioned.
        group: the processes. On CUDA it has a backend for that.
        prefetch: whether the next layer is gathered while one computes.

    Raises:
        InvalidInputError: another model, or another device than DeepSpeed's.
        MissingDependencyError: no deepspeed.
        ProcessGroupError: another process has ended, or does not answer; likewise in the methods.
    """

    def __init__(
        self, decoder: Decoder, runner: Runner, layer: int, group: ProcessGroup, *, prefetch: bool = True
    ) -> None:
        weights = partitionable(decoder.model)
        self.decoder, self.weights, self.group = decoder, weights, group
        self.numbers = range(layer + 1, decoder.num_layers)
        self.partitioned = PartitionedWeights(decoder.device)
        self._layers = [decoder.layers[number] for number in self.numbers]
        self._undo: list[Callable[[], None]] = []
        _keep_prefix(runner, weights, layer)
        weights.release()
        _start_deepspeed(decoder.device)
        try:
            with group.explained("dividing weights"):
                self._take_layers()
                self._suffix = _Suffix(self._layers, self._take_head())
            self._offload = self._install_hooks(prefetch)
        except BaseException:
            self.close()
            raise

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The flat parameters: of the layers in their order, then of the head."""
        return [getattr(module, FLAT) for module in (*self._layers, self._suffix.head)]

    @property
    def live_layers(self) -> list[int]:
        """The layers whose weights are gathered, or on their way."""
        flats = zip(self.numbers, self.parameters[:-1], strict=True)
        return [number for number, flat in flats if flat.ds_status.name != "NOT_AVAILABLE"]  # type: ignore[attr-defined]

    @property
    def nbytes(self) -> Bytes:
        """Sizes, without the memory for one dense weight."""
        flats: list[Any] = self.parameters
        whole = sum(flat.ds_numel * flat.element_size() for flat in flats)
        return Bytes(whole, sum(flat.ds_tensor.nbytes for flat in flats), sum(flat.data.nbytes for flat in flats))

    def run(
        self, hidden: Tensor, finals: Callable[[Tensor], Tensor], losses: Callable[[Tensor, Head], Tensor]
    ) -> Tensor:
        """See `Engine`."""
        with self.group.explained("gathering weights"):
            result: Tensor = self._suffix(hidden, finals=finals, losses=losses)
        return result

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        with self.group.explained("gathering weights"):
            torch.autograd.backward(loss)

    def rounds(self, count: int) -> int:
        """See `Engine`."""
        return self.group.most(count)

    def rest(self) -> None:
        """See `Engine`."""
        self._offload.partition_all_parameters()

    def close(self) -> None:
        """Let the model be as it was; no other process is needed for that."""
        while self._undo:
            self._undo.pop()()

    def _take_layers(self) -> None:
        """Partition the layers one after another, so that one of them at most is whole."""
        room = torch.empty(0, dtype=torch.uint8)
        for number, module in zip(self.numbers, self._layers, strict=True):
            layout = self.weights.layout(number)
            if len(room) < layout.nbytes:
                room = torch.empty(layout.nbytes, dtype=torch.uint8)
            flat = room[: layout.nbytes]
            if self.group.is_first:  # the others are sent its bytes
                layout.read_into(flat)
            self._demote(module)
            self.partitioned.add(number, self._partition(module, flat), layout)
            for name, linear in module.named_modules():
                if isinstance(linear, HandleLinear):
                    self._swap(linear, "handle", Handle(self.partitioned, number, name))

    def _take_head(self) -> _ZeroHead:
        """Partition the head, and let go of the model's embedding and head, which are read again afterwards."""
        head = self.decoder.head
        module = _ZeroHead(head)
        self._partition(module, head.weight.contiguous().view(-1).view(torch.uint8))
        model: Any = self.decoder.model
        drop_embedding(model)
        read_again = drop_head(model)

        def take_back() -> None:
            read_again()
            head.weight.data = model.get_output_embeddings().weight.data

        self._undo.append(take_back)
        head.weight.data = torch.empty(0, dtype=head.weight.dtype, device=head.weight.device)
        return module

    def _partition(self, module: nn.Module, flat: Tensor) -> nn.Parameter:
        """Make a flat parameter of bytes in the first process, and keep this process's part of it."""
        import deepspeed

        parameter = nn.Parameter(flat.view(STORAGE), requires_grad=False)
        module.register_parameter(FLAT, parameter)
        self._undo.append(partial(_forget, module, parameter))
        deepspeed.zero.Init(module=module, config_dict_or_path=_config(), dtype=STORAGE)
        return parameter

    def _demote(self, module: nn.Module) -> None:
        """Make buffers of a layer's norms and biases: DeepSpeed would partition each parameter, one by one."""
        for each in module.modules():
            own = dict(each._parameters)
            self._undo.append(partial(_promote, each, own))
            for name, parameter in own.items():
                if parameter is not None:
                    del each._parameters[name]
                    each.register_buffer(name, parameter.data, persistent=False)

    def _swap(self, owner: Any, name: str, value: Any) -> None:
        own = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, own))
        setattr(owner, name, value)

    def _install_hooks(self, prefetch: bool) -> Any:
        """Gather a layer before its forward and backward pass, and let it go behind either."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
        from deepspeed.utils import set_z3_leaf_modules
        from deepspeed.utils.timer import NoopTimer

        suffix = self._suffix
        if self._layers:
            set_z3_leaf_modules(suffix, [*{type(layer) for layer in self._layers}])
        self._undo.append(lambda: _clean(suffix))
        sizes = [parameter.ds_numel for parameter in self.parameters]  # type: ignore[attr-defined]
        offload = DeepSpeedZeRoOffload(
            suffix,
            NoopTimer(),
            _config(),
            prefetch_bucket_size=int(prefetch),  # of bfloat16s; any number above 0 lets one parameter follow
            max_reuse_distance=0,  # let go at once what is needed again
            max_live_parameters=sum(sizes),
            param_persistence_threshold=0,
        )

        def uninstall() -> None:
            offload.destroy()
            ours = {*suffix.modules()}  # an error in the midst of a pass leaves some
            FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in ours]

        self._undo.append(uninstall)
        return offload


def _config() -> dict[str, Any]:
    """For `zero.Init`; it wants the size of a batch, which nothing depends on."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False}
    return {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}


def _start_deepspeed(device: torch.device) -> None:
    """Let DeepSpeed take up torch's process group and the device of the model.

    Raises:
        InvalidInputError: it has chosen another kind of device, or another one.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    accelerator = deepspeed.accelerator.get_accelerator()
    chosen = accelerator.device_name(None if device.type == "cpu" else int(os.environ["LOCAL_RANK"]))
    if chosen not in (device.type, str(device)):
        remedy = f"Set DS_ACCELERATOR={device.type}, and leave --device out: LOCAL_RANK decides on it."
        raise InvalidInputError(expected_got("DeepSpeed's device", device, chosen, remedy))
    if device.type == "cpu":
        # Joining would compile a C++ op of DeepSpeed's for most of a minute, which only its inference engine uses.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    # DeepSpeed's own affair, at each process's first gather
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


@torch.no_grad()
def _keep_prefix(runner: Runner, weights: LayerWeights, layer: int) -> None:
    """Let the runner know the prefix, if it does not yet: later on there is no way for it through the layers."""
    if runner.prefix_state(layer):
        return
    one = runner.begin_prefix()
    if one is None:
        return
    hidden = one.rehearsal.entering
    for number in range(one.decoder.num_layers):
        with weights.visit(number):
            hidden = one.run(number, hidden)
            runner.keep_prefix(number, hidden)


def _promote(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """Undo what `_demote` did to a module."""
    for name, parameter in parameters.items():
        if parameter is not None:
            delattr(module, name)
    module._parameters.clear()
    module._parameters.update(parameters)


def _forget(module: nn.Module, parameter: Any) -> None:
    """Take a flat parameter off a module, and give its memory back: DeepSpeed's caches keep it for ever."""
    delattr(module, FLAT)
    parameter.ds_tensor = None
    parameter.data = torch.empty(0, dtype=STORAGE)


def _clean(suffix: nn.Module) -> None:
    """Take off what DeepSpeed leaves on modules: it would serve the next engine's hooks with this one's."""
    ours = ("_z3_leaf", "_external_params", "_original_parameters", "pre_bwd_fn", "post_bwd_fn")
    for module in suffix.modules():
        if "_original_parameters" in module.__dict__:
            module._parameters = dict(module._parameters)
        for name in [*module.__dict__]:
            if name in ours or name.startswith(("ds_", "applied_pre_backward")):
                del module.__dict__[name]
