"""NF4 with double quantisation: what bitsandbytes stores of a matrix, and a packed copy of a model, layer by layer.

The copy has the names and the format of a model that transformers saves with `load_in_4bit`, a file a layer:

    FOLDER/model-layer-00012.safetensors    linear weights in 4 bits; norms and biases as they were
    FOLDER/model-ends.safetensors           embedding, final norm, head
    FOLDER/config.json, model.safetensors.index.json    once all files are there

so a whole copy can be loaded by transformers, and what transformers saved, or others have published, can be read here.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdas_fast.errors import MissingDependencyError, UnsupportedError, expected_got
from cdas_fast.models.shards import INDEX, Shards, StoredTensor, read_header
from cdas_fast.ops.nf4 import Nf4Weight
from cdas_fast.storage import make_output_folder, write_json, write_tensors

BLOCK, NESTED_BLOCK = 64, 256  # values that share a scale, and scales that share one
STATE = "quant_state.bitsandbytes__nf4"
PIECES = ("absmax", "nested_absmax", "nested_quant_map")  # beside the packed values, as bitsandbytes names them
CONFIG: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": ["lm_head"],
}

_logger = logging.getLogger(__name__)


def require_bitsandbytes() -> None:
    """Raise `MissingDependencyError` unless bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "4-bit weights are made by bitsandbytes: install the extra with pip install 'cdas_fast[bnb]'"
        )


@torch.no_grad()
def quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """A matrix (O, I) as bitsandbytes stores it: the packed values under "weight", the rest under "weight.NAME".

    On the device of `weight`. Raises `MissingDependencyError` without bitsandbytes.
    """
    require_bitsandbytes()
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return {"weight": packed, **{f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}}


def nf4_state(stored: Mapping[str, StoredTensor], name: str) -> tuple[tuple[int, int], float | None]:
    """Shape of the quantised weight `name` of a checkpoint, and the offset of its scales (None if they are no bytes).

    Raises:
        UnsupportedError: it is quantised in another way.
    """
    state = json.loads(bytes(stored[f"{name}.{STATE}"].read().tolist()))
    nested = state.get("nested_blocksize")
    if state.get("quant_type") != "nf4" or state.get("blocksize") != BLOCK or nested not in (None, NESTED_BLOCK):
        wanted = f"NF4 in blocks of {BLOCK}, and scales in blocks of {NESTED_BLOCK} or whole"
        got = f"{state.get('quant_type')} in blocks of {state.get('blocksize')}, and scales in blocks of {nested}"
        raise UnsupportedError(expected_got(f"{stored[name].path}: {name}", wanted, got))
    rows, columns = state["shape"]
    return (rows, columns), None if nested is None else float(state["nested_offset"])


def nf4_weight(pieces: Mapping[str, Tensor], shape: tuple[int, int], offset: float | None) -> Nf4Weight:
    """What `dequantize_nf4` takes, of the tensors that bitsandbytes stores: "weight" and those of `PIECES`."""
    packed, absmax = pieces["weight"].view(-1), pieces["absmax"]
    if offset is None:
        return Nf4Weight(packed, absmax, None, None, None, shape)
    nested = pieces["nested_absmax"], pieces["nested_quant_map"]
    return Nf4Weight(packed, absmax, *nested, torch.tensor(offset, device=packed.device), shape)


class PackedCopy:
    """A folder of quantised layers, made of a checkpoint as they are asked for and found again by later runs.

    Args:
        folder: of the copy; made if there is none.
        source: the checkpoint, not quantised.
        config: of the model, as JSON values.
        layer_names: the prefix of the tensors of each layer, such as `model.layers.0.`.
        linear: names of the weights that are quantised, without the prefix and `.weight`, such as `self_attn.q_proj`.
        device: on which matrices are quantised, one at a time.
    """

    def __init__(
        self,
        folder: Path,
        source: Shards,
        config: Mapping[str, Any],
        layer_names: list[str],
        linear: Iterable[str],
        device: torch.device,
    ) -> None:
        require_bitsandbytes()
        make_output_folder(folder, "folder of packed weights")
        self.folder, self.source, self.layer_names, self.device = folder, source, layer_names, device
        self.linear, self._config = frozenset(linear), dict(config)

    def layer(self, layer: int) -> dict[str, StoredTensor]:
        """The tensors of a layer by their names in the model; quantised and written now unless they were before."""
        path = self.folder / f"model-layer-{layer:05d}.safetensors"
        if not path.exists():
            tensors: dict[str, Tensor] = {}
            prefix = self.layer_names[layer]
            for name, stored in self.source.items():
                if not name.startswith(prefix):
                    continue
                own = name.removeprefix(prefix)
                if own.removesuffix(".weight") in self.linear and own.endswith(".weight"):
                    pieces = quantize_nf4(stored.read().to(self.device))
                    tensors |= {f"{prefix}{own.removesuffix('weight')}{key}": each for key, each in pieces.items()}
                else:
                    tensors[name] = stored.read()
            write_tensors(path, tensors, {"format": "pt"})
            self._complete()
        return read_header(path)

    def ends(self) -> dict[str, StoredTensor]:
        """All tensors that belong to no layer, copied as they are."""
        path = self.folder / "model-ends.safetensors"
        if not path.exists():
            outside = {
                name: stored.read()
                for name, stored in self.source.items()
                if not any(name.startswith(prefix) for prefix in self.layer_names)
            }
            write_tensors(path, outside, {"format": "pt"})
            self._complete()
        return read_header(path)

    def _complete(self) -> None:
        """Write index and configuration when nothing is missing any more."""
        paths = [self.folder / f"model-layer-{layer:05d}.safetensors" for layer in range(len(self.layer_names))]
        paths.append(self.folder / "model-ends.safetensors")
        if not all(path.exists() for path in paths):
            return
        headers = {path.name: read_header(path) for path in paths}
        total = sum(stored.nbytes for header in headers.values() for stored in header.values())
        files = {name: file for file, header in headers.items() for name in header}
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
        write_json(self.folder / "config.json", {**self._config, "quantization_config": CONFIG})


def packed_bytes(shape: tuple[int, int]) -> int:
    """Bytes of a matrix in NF4 with double quantisation, the table of nested scales included."""
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256


def is_quantized_copy(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration says that its weights are stored in 4 bits by bitsandbytes.

    Raises:
        UnsupportedError: they are stored by another method, or in 8 bits.
    """
    found = config.get("quantization_config")
    if not found:
        return False
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        wanted = "weights that are not quantised, or in 4 bits by bitsandbytes"
        got = f"{found.get('quant_method')}{' in 8 bits' if found.get('load_in_8bit') else ''}"
        raise UnsupportedError(expected_got("model", wanted, got, "Take the original model with --load-in-4bit."))
    return True


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that may not exist yet."""
    place = folder
    while not place.exists():
        place = place.parent
    stats = os.statvfs(place)
    return stats.f_bavail * stats.f_frsize
