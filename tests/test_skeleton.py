"""Models whose layers ask for their weights: the same numbers as those of the model loaded whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer
from torch import nn

from cdas_fast import load_model
from cdas_fast.errors import CDASError, InvalidInputError, MissingDependencyError, StorageError, UnsupportedError
from cdas_fast.models import loading
from cdas_fast.models.layer_weights import LayerWeights, Layout
from cdas_fast.models.shards import SINGLE
from cdas_fast.models.skeleton import layer_weights, parameters_on_meta

LAYERS = 5
IDS = torch.tensor([[*range(5, 25)], [*range(40, 60)]])


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def whole(folder: Path, dtype: Any = "auto") -> Any:
    return load_model(folder, device="cpu", dtype=dtype)[0]


def streamed(folder: Path, resident: int | None = 0, dtype: Any = "auto", **options: Any) -> Any:
    return load_model(folder, device="cpu", dtype=dtype, resident_layers=resident, **options)[0]


def weights_of(model: nn.Module) -> LayerWeights:
    weights = layer_weights(model)
    assert weights is not None
    return weights


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    assert torch.isfinite(found).all()
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_whole_model(name: str, tied: bool, tmp_path: Path) -> None:
    saved(tiny_model(name, tie_word_embeddings=tied), tmp_path)
    expected = logits(whole(tmp_path))
    for resident in range(LAYERS + 1):
        model = streamed(tmp_path, resident)
        assert torch.equal(logits(model), expected), resident
        assert torch.equal(logits(model), expected), "what was read is read again, or kept"
        weights = weights_of(model)
        assert len(weights.resident) == resident
        assert weights.traffic.layers >= (2 if resident < 2 else 1) * (LAYERS - resident), "there are but 3 slots"
        assert (weights.traffic.bytes == 0) == (resident == LAYERS)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_other_dtype_than_the_stored_one(name: str, stored: str, dtype: str, tmp_path: Path) -> None:
    saved(tiny_model(name, dtype=getattr(torch, stored)), tmp_path)
    expected = logits(whole(tmp_path, dtype))
    model = streamed(tmp_path, 2, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_is_the_dtype_of_the_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tiny_model(dtype=dtype), tmp_path)
    for without in (False, True):
        if without:
            change_config(tmp_path, dtype=None)
        assert streamed(tmp_path).dtype == whole(tmp_path).dtype == dtype


def change_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: each for name, each in config.items() if each is not None}))


def test_biases_are_read(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    saved(model, tmp_path)
    expected = logits(model)
    found = streamed(tmp_path, 1)
    assert torch.equal(logits(found), expected)
    biases = {name for name, _ in found.named_parameters() if name.endswith("bias")}
    assert len(biases) == 3 * LAYERS


def test_tensors_that_training_left_in_the_files_are_no_matter(tmp_path: Path) -> None:
    """Computed buffers that old versions stored, and a part that the language model does not have."""
    model = tiny_model()
    saved(model, tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 99.0)
    tensors["vision_tower.weight"] = torch.ones(3, 3)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    assert torch.equal(logits(streamed(tmp_path)), logits(model))


def test_base_model_saved_by_itself(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    saved(model.model, tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / SINGLE))
    assert torch.equal(logits(streamed(tmp_path, 2)), logits(model))


def test_model_of_several_shards(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(streamed(tmp_path)), logits(model))


def test_generation(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.update(max_new_tokens=11, repetition_penalty=1.3, eos_token_id=[2, 7])
    saved(model, tmp_path)
    ordinary, found = whole(tmp_path), streamed(tmp_path)
    assert found.generation_config.to_dict() == ordinary.generation_config.to_dict()
    expected = ordinary.generate(IDS, do_sample=False)
    assert expected.shape[1] > IDS.shape[1] + 1
    for use_cache in (True, False):
        assert torch.equal(found.generate(IDS, do_sample=False, use_cache=use_cache), expected)
    (tmp_path / "generation_config.json").unlink()
    assert torch.equal(
        streamed(tmp_path).generate(IDS, do_sample=False), whole(tmp_path).generate(IDS, do_sample=False)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_no_tensor_is_without_memory_or_without_value(name: str, tmp_path: Path) -> None:
    """Models made on the meta device have rotary tables of uninitialised memory, if nobody computes them again."""
    saved(tiny_model(name), tmp_path)
    model, ordinary = streamed(tmp_path), whole(tmp_path)
    expected = dict(ordinary.named_buffers())
    found = dict(model.named_buffers())
    assert found.keys() == expected.keys()
    assert any("inv_freq" in name for name in found)
    for name, buffer in found.items():
        assert buffer.device.type == "cpu"
        assert torch.isfinite(buffer).all()
        assert torch.equal(buffer, expected[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu", name
        assert not parameter.requires_grad
        assert torch.equal(parameter, ordinary.get_parameter(name))
    assert not model.training


def test_stored_buffers_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the scalar of each layer of Gemma 4."""
    from transformers.models.llama import modeling_llama

    class Layer(modeling_llama.LlamaDecoderLayer):
        layer_scalar: torch.Tensor

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("layer_scalar", torch.ones(1))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * self.layer_scalar

    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", Layer)
    model = tiny_model()
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.5 + number)
    saved(model, tmp_path)
    assert torch.equal(logits(streamed(tmp_path)), logits(model))
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.1.layer_scalar"] = torch.ones(2)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(InvalidInputError, match=r"model\.layers\.1\.layer_scalar: expected shape \(1,\), .*got \(2,\)"):
        streamed(tmp_path)


def test_the_meta_device_is_for_the_context_alone() -> None:
    with parameters_on_meta():
        inside = nn.Linear(2, 2)
        inside.register_parameter("none", None)
    assert inside.weight.is_meta
    with pytest.raises(RuntimeError, match="half-made"), parameters_on_meta():
        raise RuntimeError("half-made")
    assert not nn.Linear(2, 2).weight.is_meta


# 4 bits


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A folder, that of its packed copies, and the whole model with dequantised weights."""
    bnb = pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.mktemp("four bits")
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=128)
    saved(model, place / "model")
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if type(module) is nn.Linear:
                    values, state = bnb.functional.quantize_4bit(
                        module.weight, blocksize=64, compress_statistics=True, quant_type="nf4"
                    )
                    own = module.weight.clone()
                    module.weight.copy_(bnb.functional.dequantize_4bit(values, state))
                    assert not torch.equal(module.weight, own)
    model.requires_grad_(False)
    return place / "model", place / "packed", model


def values_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    embeddings = (0.5 * torch.randn(2, 9, 64)).requires_grad_()
    found = model(inputs_embeds=embeddings, use_cache=False).logits.float()
    found.backward(torch.randn(found.shape))
    assert embeddings.grad is not None
    return found.detach(), embeddings.grad


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{error:.3g}"


@pytest.mark.parametrize("resident", [0, 1, 3, None])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_4_bits_are_the_dequantised_weights(
    autocast: bool, resident: int | None, four_bits: tuple[Path, Path, Any]
) -> None:
    folder, copies, expected = four_bits
    model = streamed(folder, resident, load_in_4bit=True, packed_dir=copies)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if autocast:
        context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with torch.no_grad(), context():  # after a pass without gradient, bitsandbytes has none any more on some CPUs
        model(input_ids=IDS)
        assert_near(model(input_ids=IDS).logits.float(), expected(input_ids=IDS).logits.float(), 1e-6)
    with context():
        found, right = values_and_gradient(model), values_and_gradient(expected)
    for each, its in zip(found, right, strict=True):
        assert float(its.abs().max()) > 0
        assert_near(each, its, 1e-6)
    original = values_and_gradient(whole(folder))[1]
    assert float((original - right[1]).abs().max() / right[1].abs().max()) > 0.01, "the weights matter"


def test_4_bits_in_bfloat16(four_bits: tuple[Path, Path, Any]) -> None:
    folder, copies, expected = four_bits
    model = streamed(folder, 1, dtype="bfloat16", load_in_4bit=True, packed_dir=copies)
    name = "mlp.down_proj"
    right = expected.model.layers[3].mlp.down_proj.weight
    assert torch.equal(weights_of(model).dense(3, name, torch.bfloat16), right.bfloat16()), "rounded once"
    assert torch.equal(weights_of(model).dense(3, name, torch.float32), right)
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_4_bits_of_every_architecture(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    saved(tiny_model(name), tmp_path / "model")
    model = streamed(tmp_path / "model", 1, load_in_4bit=True, packed_dir=tmp_path / "packed")
    ordinary, weights = whole(tmp_path / "model"), weights_of(model)
    with torch.no_grad():
        for number, layer in enumerate(ordinary.model.layers):
            for linear, module in layer.named_modules():
                if type(module) is nn.Linear:
                    module.weight.copy_(weights.dense(number, linear, torch.float32))
    assert_near(logits(model), logits(ordinary), 1e-6)
    assert torch.equal(model.generate(IDS, max_new_tokens=5), ordinary.generate(IDS, max_new_tokens=5))


# What is refused


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def instead(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


BREAKS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    name: (without(name), f"a tensor {name}, got none")
    for name in (
        "model.layers.4.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.3.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    )
}
BREAKS |= {
    f"{name} transposed or short": (
        instead(name, torch.ones(shape)),
        rf"{name}: expected shape .*, by the config.*, got",
    )
    for name, shape in {
        "model.layers.4.mlp.up_proj.weight": (32, 48),
        "model.layers.0.self_attn.q_proj.weight": (1024,),
        "model.layers.2.input_layernorm.weight": (31,),
        "model.layers.1.self_attn.k_proj.bias": (16, 1),
        "model.embed_tokens.weight": (319, 32),
        "model.norm.weight": (1,),
        "lm_head.weight": (32, 320),
    }.items()
}
BREAKS |= {
    f"{name} added": (
        instead(name, torch.ones(2)),
        f"expected tensors that its configuration has a place for, got {name}",
    )
    for name in ("model.layers.1.mlp.up_proj.bias", "model.layers.4.extra.weight", "model.layers.0.mlp.up_proj.SCB")
}
BREAKS["integers"] = (
    instead("model.layers.3.mlp.up_proj.weight", torch.ones(48, 32, dtype=torch.int8)),
    r"model\.layers\.3\.mlp\.up_proj\.weight: expected floating-point numbers, .*, got torch\.int8\. Take the original",
)


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["plain", "4 bits"])
@pytest.mark.parametrize(("change", "message"), BREAKS.values(), ids=BREAKS)
def test_checkpoint_that_does_not_fit_is_refused_by_the_name_of_the_tensor(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, load_in_4bit: bool, tmp_path: Path
) -> None:
    if load_in_4bit:
        pytest.importorskip("bitsandbytes")
    saved(tiny_model("qwen2"), tmp_path / "model")
    change_tensors(tmp_path / "model", change)
    with pytest.raises((InvalidInputError, UnsupportedError), match=message) as caught:
        streamed(tmp_path / "model", 0, load_in_4bit=load_in_4bit, packed_dir=tmp_path / "packed")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model") in str(caught.value)
    assert not list(tmp_path.glob("packed/*/*.safetensors"))


def test_truncated_file_is_named(tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"model\.safetensors: expected .*: download or copy it again\."):
        streamed(tmp_path)


def test_file_that_shrinks_while_it_is_used(tmp_path: Path) -> None:
    """The error comes out of the pass, not of a thread; when the file is whole again, so is the model."""
    model = tiny_model()
    saved(model, tmp_path)
    found, path = streamed(tmp_path), tmp_path / SINGLE
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StorageError, match=r"model\.safetensors: model\.layers\..*: expected .* bytes at .*, got \d+"):
        logits(found)
    path.write_bytes(content)
    assert torch.equal(logits(found), logits(model))


def test_failed_read_ahead_leaves_nothing_behind(tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path)
    weights, right = weights_of(streamed(tmp_path)), weights_of(streamed(tmp_path, dtype="float32"))
    own, name = weights._layouts, "mlp.up_proj"

    def fails(layer: int) -> Layout:
        raise StorageError("no room")

    weights._layouts = fails if 2 not in weights._known else own
    weights._known[1] = own(1)
    with pytest.raises(StorageError, match="no room"), weights.visit(1, then=2):
        raise AssertionError("not reached")
    weights._layouts = own
    weights.dense(1, name, torch.bfloat16)  # not within a visit
    for layer in (3, 2, 1):
        with weights.visit(layer):
            found = weights.dense(layer, name, torch.bfloat16)
            assert torch.equal(found, right.dense(layer, name, torch.float32).bfloat16()), layer


@pytest.mark.parametrize("resident", [-1, LAYERS + 1])
def test_number_of_resident_layers(resident: int, model_folder: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=rf"resident_layers: expected a number from 0 to {LAYERS}, got {resident}"
    ):
        streamed(model_folder, resident)


def test_model_of_the_hub(monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path) -> None:
    """Weights that lie there twice are fetched once, and the commit is known."""
    hub, snapshots = tmp_path / "hub", tmp_path / "snapshots"
    shutil.copytree(model_folder, hub)
    for other in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin"):
        (hub / other).parent.mkdir(exist_ok=True)
        (hub / other).write_bytes(b"the same")
    commit = "0123456789abcdef0123456789abcdef01234567"
    utilities: Any = huggingface_hub.utils

    def download(repository: str, *, revision: str, **patterns: Any) -> str:
        assert (repository, revision) == ("someone/tiny", "main")
        names = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        for name in utilities.filter_repo_objects(names, **patterns):
            (snapshots / commit / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub / name, snapshots / commit / name)
        return str(snapshots / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model: Any = load_model("someone/tiny", tiny_tokenizer(), revision="main", device="cpu", resident_layers=1)[0]
    assert model.config._commit_hash == commit
    assert model.name_or_path == "someone/tiny"
    fetched = {str(path.relative_to(snapshots / commit)) for path in snapshots.rglob("*") if path.is_file()}
    assert {name for name in fetched if not name.endswith((".json", ".jinja"))} == {"model.safetensors"}


def test_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    from tiny_models import SIZES
    from transformers import AutoModelForCausalLM, MixtralConfig

    saved(AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, num_local_experts=2)), tmp_path)
    message = (
        r"MixtralForCausalLM: expected layers whose weights are linear maps, got .*experts.*\. Load the model whole"
    )
    for options in ({"resident_layers": 1}, {"load_in_4bit": True}):
        with pytest.raises(UnsupportedError, match=message):
            load_model(tmp_path, device="cpu", packed_dir=tmp_path / "packed", **options)
    assert not (tmp_path / "packed").exists()


def test_gguf_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading, "_require_gguf", lambda: None)
    for options in ({"resident_layers": 1}, {"load_in_4bit": True}):
        with pytest.raises(
            InvalidInputError, match=r"expected safetensors files, got model\.gguf\. Load it whole, save"
        ):
            load_model(tmp_path / "model.gguf", device="cpu", **options)


def test_model_object_is_refused_unless_it_is_one_already(model_folder: Path) -> None:
    for options in ({"resident_layers": 1}, {"load_in_4bit": True}):
        with pytest.raises(
            InvalidInputError, match=r"expected a name, for 4-bit weights or streaming, got an object\. G"
        ):
            load_model(tiny_model(), tiny_tokenizer(), **options)
    model = streamed(model_folder, 1)
    assert load_model(model, tiny_tokenizer(), resident_layers=1)[0] is model


def test_4_bits_without_bitsandbytes_name_the_extra(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, tmp_path: Path
) -> None:
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: own(name) if name != "bitsandbytes" else None)
    with pytest.raises(MissingDependencyError, match=r"made by bitsandbytes: install the extra .*cdas_fast\[bnb\]"):
        load_model(model_folder, device="cpu", load_in_4bit=True, packed_dir=tmp_path)
    assert torch.equal(logits(streamed(model_folder)), logits(whole(model_folder)))


def test_folder_of_pickled_weights(tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CDASError, match=r"got neither\. Save the model with save_pretrained\(.*safe_serialization"):
        streamed(tmp_path)
