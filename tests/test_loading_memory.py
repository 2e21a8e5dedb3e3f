"""Peak memory of loading a model of 390 MiB whose layers are read when they are needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import LlamaConfig

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[1]
V, D, F, L = 20000, 1024, 3584, 12
KV = D // 4
LAYER = 2 * D * D + 2 * D * KV + 3 * D * F  # values of a layer's matrices
LARGEST = D * F
PACKED = 0.52  # bytes a value, scales included
QUANTISING = 10  # bytes a value to quantise a matrix that is a part or two of what is quantised at once, measured 7
OUTSIDE = 2 * 2 * V * D  # bytes of embedding and head
TOLERANCE = 24 * 2**20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16, written layer by layer, and a tiny one beside it."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()

    def norm() -> Tensor:
        return torch.ones(D, dtype=torch.bfloat16)

    files: dict[str, str] = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    attention = {"q_proj": (D, D), "k_proj": (KV, D), "v_proj": (KV, D), "o_proj": (D, D)}
    mlp = {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}
    for layer in range(L):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{name}.weight": matrix(*shape) for name, shape in attention.items()}
        tensors |= {f"{prefix}mlp.{name}.weight": matrix(*shape) for name, shape in mlp.items()}
        tensors |= {f"{prefix}{name}_layernorm.weight": norm() for name in ("input", "post_attention")}
        write(f"model-{layer:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": matrix(V, D), "lm_head.weight": matrix(V, D), "model.norm.weight": norm()}
    write("model-end.safetensors", ends)
    index = {"metadata": {"total_size": 2 * L * LAYER + OUTSIDE}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny = folder.parent / "tiny"
    tiny_model(dtype=torch.bfloat16, hidden_size=64, head_dim=16).save_pretrained(tiny)
    for each in (folder, tiny):
        tiny_tokenizer().save_pretrained(each)
    return folder


MEASURE = """
import json, sys
import torch
from pathlib import Path
from cdas_fast import load_model

torch.set_num_threads(1)
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])

def size(name):
    with open("/proc/self/status") as status:
        return int(dict(line.split(":") for line in status)[name].split()[0]) * 1024

@torch.no_grad()
def load_and_run(folder, **options):
    model, _ = load_model(folder, device="cpu", **options)
    model(input_ids=torch.arange(16)[None])
    return model

packed = {"packed_dir": folder.parent / "packed"} if options else {}
load_and_run(folder.parent / "tiny", **options, **packed)  # whatever is imported
bare = size("VmRSS")
load_and_run(folder, **options, **packed)
print(size("VmHWM") - bare)
"""


def peak(folder: Path, **options: int) -> int:
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps(options)]
    # glibc keeps what is less than 32 MiB and was freed, as no matrix of a large model is
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_loading_takes_the_ends_and_a_few_layers(large: Path) -> None:
    pytest.importorskip("bitsandbytes")
    layers = (2 + 3) * PACKED * LAYER  # resident, and slots
    dense = 2 * LARGEST  # one at a time
    packing = 2 * PACKED * LAYER + (2 + QUANTISING) * LARGEST  # a layer and what is written of it, and a matrix
    first = peak(large, load_in_4bit=True, resident_layers=2)
    assert first < OUTSIDE + layers + dense + packing + TOLERANCE
    later = peak(large, load_in_4bit=True, resident_layers=2)
    assert later < OUTSIDE + layers + dense + TOLERANCE
    assert later > OUTSIDE, "measured what was to be measured"
    control = peak(large)
    assert control > 2 * L * LAYER
    assert control > 1.5 * first, "the whole model would be noticed"


def test_streaming_without_4_bits(large: Path) -> None:
    found = peak(large, resident_layers=0)
    assert found < OUTSIDE + 3 * 2 * LAYER + TOLERANCE
