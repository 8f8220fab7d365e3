"""The packed file, and the reader of Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ktk import CPUInfer, Experts, KTMoEWrapper, WorkerPoolConfig, _native
from ktk.config import LayerConfig
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError
from ktk.weights import Checkpoint, PackedFile, PackedLayer, PackedWriter, find_packed, packed_path
from reference.packing import pack
from torch_layers import Weights, assert_matches, assert_wrapper_matches, batch, form_of

pytestmark = pytest.mark.filterwarnings("ignore:NUMA node:RuntimeWarning")

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("bf16", {}),
    ("int8", {}),
    ("int8", {"group_size": 0}),
    ("int8", {"group_size": 128, "rotated": False}),
    ("int8", {"group_size": 512, "rotated": False}),
    ("int4", {"group_size": 0, "rotated": False}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 64}),
    ("fp8", {}),
]


def make_experts(weights: Weights, format: str = "int8", **options: Any) -> Experts:
    return Experts.from_weights(
        *weights.matrices(), **weights.biases(), num_experts_per_tok=2, format=format, threads=1, **options
    )


# ---- the packed file -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_saved_and_loaded_layers_agree_bit_for_bit(
    tmp_path: Path, format: str, options: dict[str, Any], bias: bool
) -> None:
    weights = Weights.random(1, hidden=70, inner=150, bias=bias)
    inputs = batch(2, 6, hidden=70)
    file = tmp_path / "layer.safetensors"
    with make_experts(weights, format, swiglu_limit=2.0, layer_idx=7, **options) as experts:
        expected = experts(*inputs)
        experts.save(file, source="somewhere")
        with Experts.from_packed(file, threads=1) as loaded:
            assert loaded.config == experts.config
            assert torch.equal(loaded(*inputs), expected)
            assert loaded.weight_bytes == experts.weight_bytes
            loaded.save(tmp_path / "again.safetensors", source="somewhere")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("format", "options"), VARIANTS)
def test_the_file_holds_the_documented_bytes(tmp_path: Path, format: str, options: dict[str, Any]) -> None:
    weights = Weights.random(1, hidden=70, inner=50, bias=True)
    file = tmp_path / "layer.safetensors"
    with make_experts(weights, format, layer_idx=3, **options) as experts:
        experts.save(file, source="somewhere")
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    assert metadata["format"] == "ktk"
    assert metadata["ktk_layout_version"] == "3"
    assert metadata["ktk_source"] == "somewhere"
    (layer,) = json.loads(metadata["ktk_layers"])
    assert layer == {
        "layer_idx": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 70,
        "intermediate_size": 50,
        "format": format,
        "group_size": form_of(format, **options).group,
        "rotated": form_of(format, **options).rotated,
        "swiglu_limit": 0.0,
        "swiglu_alpha": 0.0,
        "bias": True,
    }
    form = form_of(format, **options)
    for index in range(4):
        for part, expected in pack(weights.expert(index), form).items():
            name = "layers.3.experts." + ".".join(part.rsplit("_", 1))
            if expected.size == 0:
                assert name not in tensors
                continue
            actual = tensors[name][index].contiguous().view(torch.uint8).flatten().numpy()
            assert np.array_equal(actual, expected.reshape(-1).view(np.uint8)), part


def test_the_file_does_not_depend_on_the_subpools(tmp_path: Path) -> None:
    weights = Weights.random(1, hidden=70, inner=300)
    files = []
    for count in (1, 2, 3):
        pool = CPUInfer(
            WorkerPoolConfig(
                subpool_count=count,
                subpool_numa_map=[0] * count,
                subpool_thread_count=[1] * count,
                bind_threads=False,
            )
        )
        with Experts.from_weights(
            *weights.matrices(), num_experts_per_tok=2, format="int4", cpu_infer=pool
        ) as experts:
            files.append(tmp_path / f"{count}.safetensors")
            experts.save(files[-1])
            expected = experts(*batch(2, 5, hidden=70))
        for file in files:
            with Experts.from_packed(file, cpu_infer=pool) as loaded:
                assert torch.equal(loaded(*batch(2, 5, hidden=70)), expected)
    assert len({file.read_bytes() for file in files}) == 1


def test_several_layers_in_one_file(tmp_path: Path) -> None:
    weights = [Weights.random(seed) for seed in (1, 2)]
    file = tmp_path / "ktk-int8.safetensors"
    layers = [make_experts(each, layer_idx=index * 5) for index, each in enumerate(weights)]
    headers = [PackedLayer.from_config(layer.config, bias=False) for layer in layers]
    with PackedWriter(file, headers) as writer:
        for layer, header in zip(layers, headers, strict=True):
            for expert in reversed(range(4)):
                layer._export(writer, header, expert, expert)
    with PackedFile(file) as packed:
        assert sorted(packed.layers) == [0, 5]
    with pytest.raises(KtkArgumentError, match="layer_idx"):
        Experts.from_packed(file)
    with pytest.raises(KtkArgumentError, match="no layer 3"):
        Experts.from_packed(file, layer_idx=3)
    inputs = batch(2, 5)
    for index, layer in zip((0, 5), layers, strict=True):
        with Experts.from_packed(file, layer_idx=index, threads=1) as loaded:
            assert torch.equal(loaded(*inputs), layer(*inputs))
    assert find_packed(tmp_path, "int8", 5) == file
    assert find_packed(tmp_path, "int4", 5) is None


def test_options_for_running_a_packed_layer(tmp_path: Path) -> None:
    file = tmp_path / "layer.safetensors"
    with make_experts(Weights.random(1)) as experts:
        experts.save(file)
    with Experts.from_packed(file, max_tokens=3, strict=True, num_experts_per_tok=4, threads=1) as loaded:
        assert (loaded.config.max_tokens, loaded.config.strict, loaded.config.num_experts_per_tok) == (
            3,
            True,
            4,
        )


@pytest.mark.parametrize("order", [[2, 0, 3, 1], [1, 1, 0, 2]])
def test_maps(tmp_path: Path, order: list[int]) -> None:
    weights = Weights.random(1)
    inputs = batch(2, 8)
    reference = weights.reference(form_of("int8"), order=order)
    file, plain = tmp_path / "mapped.safetensors", tmp_path / "plain.safetensors"
    with make_experts(weights) as experts:
        experts.save(plain, source="tensors")
        # Whatever the slots hold, the file holds the experts of the model in their order.
        experts.load_tensors(*weights.matrices(), physical_to_logical_map=torch.tensor(order), save_to=file)
        assert_matches(experts(*inputs), reference, *inputs)
        assert file.read_bytes() == plain.read_bytes()
        if len(set(order)) == 4:
            experts.save(file, source="tensors")
            assert file.read_bytes() == plain.read_bytes()
        else:
            with pytest.raises(KtkStateError, match="only experts"):
                experts.save(file)
        experts.load_tensors(*Weights.random(9).matrices())
        experts.load_packed(plain, physical_to_logical_map=order)
        assert_matches(experts(*inputs), reference, *inputs)


def test_more_slots_than_experts(tmp_path: Path) -> None:
    weights = Weights.random(1)
    file = tmp_path / "layer.safetensors"
    with make_experts(weights) as experts:
        experts.save(file)
    config = LayerConfig(
        num_experts=6, num_experts_per_tok=2, hidden_size=80, intermediate_size=48, format="int8"
    )
    order = [0, 1, 2, 3, 2, 0]
    inputs = batch(2, 8, experts=6)
    with Experts(config, threads=1) as experts:
        experts.load_packed(file, physical_to_logical_map=order)
        assert_matches(experts(*inputs), weights.reference(form_of("int8"), order=order), *inputs)
        with pytest.raises(KtkArgumentError, match="physical_to_logical_map"):
            experts.load_packed(file)
        assert experts.loaded


# ---- damaged and foreign files ---------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    file = tmp_path / "layer.safetensors"
    with make_experts(Weights.random(1), "int4", layer_idx=2) as experts:
        experts.save(file)
    return file


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -5000])
def test_truncated(packed: Path, keep: int) -> None:
    data = packed.read_bytes()
    packed.write_bytes(data[:keep])
    with pytest.raises(KtkArgumentError, match=r"cut short|not a packed file"):
        Experts.from_packed(packed)


def test_bytes_after_the_end(packed: Path) -> None:
    packed.write_bytes(packed.read_bytes() + b"x")
    with pytest.raises(KtkArgumentError, match="after its end"):
        Experts.from_packed(packed)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF" + bytes(100),
        b"{}",
        b"\x04" + bytes(7) + b"nope",
        b"\x02" + bytes(7) + b"[]",
        b"\x02" + bytes(7) + b"{}",
    ],
)
def test_foreign(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "foreign.safetensors"
    file.write_bytes(content)
    with pytest.raises(KtkArgumentError, match="not a packed file"):
        PackedFile(file)


def test_a_safetensors_file_of_something_else(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(KtkArgumentError, match="not a packed file"):
        PackedFile(tmp_path / "model.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PackedFile(tmp_path / "none.safetensors")


def set_version(header: dict[str, Any]) -> None:
    header["__metadata__"]["ktk_layout_version"] = "1"


def set_layers(layers: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["ktk_layers"] = layers if isinstance(layers, str) else json.dumps(layers)

    return change


def edit_layer(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        (layer,) = json.loads(header["__metadata__"]["ktk_layers"])
        header["__metadata__"]["ktk_layers"] = json.dumps([{**layer, **values}])

    return change


def drop_tensor(header: dict[str, Any]) -> None:
    del header["layers.2.experts.down.scale"]


def add_tensor(header: dict[str, Any]) -> None:
    header["extra"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_version, "layout version 1, and this ktk reads version 3"),
        (set_layers("{"), "damaged description"),
        (set_layers([]), "no layers"),
        (set_layers([{"layer_idx": 2}]), "damaged description"),
        (edit_layer(format="int5"), "damaged description"),
        (edit_layer(hidden_size=0), "damaged description"),
        (edit_layer(rotated="no"), "damaged description"),
        (edit_layer(hidden_size=96), "contradicts itself"),
        (edit_layer(num_experts=5), "contradicts itself"),
        (edit_layer(group_size=0), "no layer accounts for"),
        (edit_layer(layer_idx=3), "contradicts itself"),
        (drop_tensor, "contradicts itself"),
        (add_tensor, "no layer accounts for"),
    ],
)
def test_headers_that_do_not_fit(packed: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    rewrite_header(packed, change)
    with pytest.raises(KtkArgumentError, match=words):
        Experts.from_packed(packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(packed: Path, value: float) -> None:
    good = packed.read_bytes()
    with PackedFile(packed) as file:
        part = next(part for part in file.layer(2).parts if part.name == "down.scale")
        offset = file.address(2, 1, part) - file.address(2, 0, file.layer(2).parts[0]) + file._data_begin
    bad = bytearray(good)
    bad[offset : offset + 4] = np.float32(value).tobytes()
    packed.write_bytes(bad)
    inputs = batch(2, 5)
    with make_experts(Weights.random(1), "int4", layer_idx=2) as experts:
        expected = experts(*inputs)
        with pytest.raises(KtkArgumentError, match=r"down\.scale of expert 1 of layer 2"):
            experts.load_packed(packed)
        # Half of the new weights are in: running would mix them with the old ones.
        with pytest.raises(KtkStateError, match="failed"):
            experts(*inputs)
        packed.write_bytes(good)
        experts.load_packed(packed)
        assert torch.equal(experts(*inputs), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "int8", "group_size": 0}, "format int4"),
        ({"group_size": 64}, "group_size 32"),
        ({"rotated": False}, "rotated True, and this layer has False"),
        ({"hidden_size": 64}, "hidden_size 80"),
        ({"intermediate_size": 64}, "intermediate_size 48"),
        ({"swiglu_limit": 1.0}, r"swiglu_limit 0\.0"),
        ({"num_experts": 3}, "4 experts"),
        ({"layer_idx": 1}, "no layer 1"),
    ],
)
def test_files_for_another_layer(packed: Path, options: dict[str, Any], words: str) -> None:
    values: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 80,
        "intermediate_size": 48,
        "format": "int4",
        "layer_idx": 2,
    }
    with (
        Experts(LayerConfig(**{**values, **options}), threads=1) as experts,
        pytest.raises(KtkArgumentError, match=words),
    ):
        experts.load_packed(packed)


# ---- writing ---------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(packed: Path) -> None:
    before = packed.read_bytes()
    with make_experts(Weights.random(5), "int4", layer_idx=2) as experts:
        header = PackedLayer.from_config(experts.config, bias=False)
        with pytest.raises(ZeroDivisionError), PackedWriter(packed, [header]) as writer:
            experts._export(writer, header, 0, 0)
            raise ZeroDivisionError
        with pytest.raises(KtkStateError, match="missing"), PackedWriter(packed, [header]) as writer:
            experts._export(writer, header, 0, 0)
        assert packed.read_bytes() == before
        assert os.listdir(packed.parent) == [packed.name]
        experts.save(packed)
    assert packed.read_bytes() != before
    assert os.listdir(packed.parent) == [packed.name]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with make_experts(Weights.random(5)) as experts:
        header = PackedLayer.from_config(experts.config, bias=False)
        target = tmp_path / "new" / "layer.safetensors"
        with PackedWriter(target, [header]) as writer:
            for expert in range(4):
                experts._export(writer, header, expert, expert)
            assert not target.exists()
        assert target.exists()
        with pytest.raises(KtkStateError, match="closed"):
            writer.commit()
        with pytest.raises(KtkStateError, match="closed"):
            writer.write(0, 0, "gate_up.weight", b"")
        umask = os.umask(0)
        os.umask(umask)
        assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_failed_pack_writes_nothing(tmp_path: Path) -> None:
    weights = Weights.random(1)
    weights.up[3, 0, 0] = float("nan")
    with make_experts(Weights.random(2)) as experts:
        with pytest.raises(KtkArgumentError):
            experts.load_tensors(*weights.matrices(), save_to=tmp_path / "layer.safetensors")
        assert os.listdir(tmp_path) == []
        with pytest.raises(KtkStateError, match="failed"):
            experts(*batch(2, 1))
        with pytest.raises(KtkStateError, match="failed"):
            experts.save(tmp_path / "layer.safetensors")


def test_writer_checks_its_arguments(tmp_path: Path) -> None:
    config = LayerConfig(
        num_experts=2, num_experts_per_tok=1, hidden_size=8, intermediate_size=8, format="bf16"
    )
    header = PackedLayer.from_config(config, bias=False)
    with pytest.raises(KtkArgumentError, match="at least one layer"):
        PackedWriter(tmp_path / "x", [])
    with pytest.raises(KtkArgumentError, match="different numbers"):
        PackedWriter(tmp_path / "x", [header, header])
    writer = PackedWriter(tmp_path / "x", [header])
    for arguments, words in (
        ((1, 0, "down.weight", b""), "not planned"),
        ((0, 0, "down.scale", b""), "not planned"),
        ((0, 2, "down.weight", b""), "expert"),
        ((0, 0, "down.weight", b"short"), "bytes, got 5"),
    ):
        with pytest.raises(KtkArgumentError, match=words):
            writer.write(*arguments)
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_closed_files(packed: Path) -> None:
    with PackedFile(packed) as file:
        part = file.layer(2).parts[0]
        file.release_pages()
        assert file.address(2, 1, part) - file.address(2, 0, part) == part.nbytes
        with pytest.raises(KtkArgumentError, match="expert"):
            file.address(2, 4, part)
    file.close()
    with pytest.raises(KtkStateError, match="closed"):
        file.address(2, 0, part)


def test_part_numbers_are_those_of_the_library() -> None:
    config = LayerConfig(
        num_experts=1,
        num_experts_per_tok=1,
        hidden_size=8,
        intermediate_size=8,
        group_size=32,
    )
    parts = PackedLayer.from_config(config, bias=True).parts
    assert len(parts) == 9
    for part in parts:
        assert part.code == getattr(_native, "PART_" + part.name.replace(".", "_").upper())


# ---- through the wrapper ---------------------------------------------------------------------------


def make_wrapper(path: Path | str, layer_idx: int = 2, **options: Any) -> Any:
    return KTMoEWrapper(
        layer_idx, 4, 2, 80, 48, None, 1, 1, str(path), 64, **{"method": "AMXINT4", **options}
    )


@pytest.mark.parametrize("single_file", [False, True])
def test_wrapper_saves_and_loads(tmp_path: Path, single_file: bool) -> None:
    weights = Weights.random(1)
    inputs = batch(2, 5)
    path = tmp_path / "layer.safetensors" if single_file else tmp_path
    first = make_wrapper(path, cpu_save=True)
    first.load_weights_from_tensors(*weights.matrices(), torch.arange(4))
    expected = first.forward(*inputs).clone()
    assert_wrapper_matches(expected, weights.reference(form_of("int4")), *inputs)
    assert [file.name for file in tmp_path.iterdir()] == [
        path.name if single_file else packed_path(tmp_path, "int4", 2).name
    ]
    second = make_wrapper(path)
    second.load_weights(torch.arange(4))
    assert torch.equal(second.forward(*inputs), expected)
    order = torch.tensor([3, 1, 0, 2])
    second.load_weights(order)
    reference = weights.reference(form_of("int4"), order=order.tolist())
    assert_wrapper_matches(second.forward(*inputs), reference, *inputs)


def without_rotation(file: Path) -> None:
    """Take the entry out that older files do not have."""

    def change(header: dict[str, Any]) -> None:
        (layer,) = json.loads(header["__metadata__"]["ktk_layers"])
        del layer["rotated"]
        header["__metadata__"]["ktk_layers"] = json.dumps([layer])

    rewrite_header(file, change)


def test_files_without_the_entry_are_not_rotated(tmp_path: Path) -> None:
    file, weights, inputs = tmp_path / "layer.safetensors", Weights.random(1), batch(2, 5)
    with make_experts(weights, "int8", group_size=128, rotated=False) as experts:
        experts.save(file)
        expected = experts(*inputs)
    without_rotation(file)
    with Experts.from_packed(file, threads=1) as loaded:
        assert (loaded.config.group_size, loaded.config.rotated) == (128, False)
        assert torch.equal(loaded(*inputs), expected)
    with pytest.raises(KtkArgumentError, match="rotated False, and this layer has True"):
        Experts.from_packed(file, rotated=True, threads=1)


@pytest.mark.parametrize("mode", ["inference", "sft"])
def test_wrapper_follows_the_files_in_what_is_left_open(tmp_path: Path, mode: str) -> None:
    weights = Weights.random(1)
    options: dict[str, Any] = {"method": "AMXINT4" if mode == "inference" else "AMXINT4_SFT", "mode": mode}
    if mode == "sft":
        options["lora_rank"] = 0
    first = make_wrapper(tmp_path, group_size=64, rotated=False, cpu_save=True)
    first.load_weights_from_tensors(*weights.matrices(), torch.arange(4))
    second = make_wrapper(tmp_path, **options)
    second.load_weights(torch.arange(4))
    config = second.experts.config
    assert (config.group_size, config.rotated) == (64, False)
    inputs = batch(2, 5)
    assert_matches(second.experts(*inputs), weights.reference(form_of("int4", 64, False)), *inputs)
    with pytest.raises(KtkArgumentError, match="rotated False, and this layer has True"):
        make_wrapper(tmp_path, rotated=True, **options).load_weights(torch.arange(4))
    with pytest.raises(KtkArgumentError, match="group_size 64, and this layer has 32"):
        make_wrapper(tmp_path, group_size=32, **options).load_weights(torch.arange(4))


def test_wrapper_without_cpu_save_writes_nothing(tmp_path: Path) -> None:
    make_wrapper(tmp_path).load_weights_from_tensors(*Weights.random(1).matrices(), torch.arange(4))
    assert os.listdir(tmp_path) == []


def test_wrapper_paths_that_do_not_work(tmp_path: Path) -> None:
    with pytest.raises(KtkArgumentError, match="weight_path"):
        make_wrapper("").load_weights(None)
    with pytest.raises(KtkArgumentError, match="weight_path"):
        make_wrapper("", cpu_save=True).load_weights_from_tensors(*Weights.random(1).matrices())
    with pytest.raises(FileNotFoundError, match="weight_path"):
        make_wrapper(tmp_path / "none").load_weights(None)
    with pytest.raises(KtkArgumentError, match="neither a checkpoint nor packed"):
        make_wrapper(tmp_path).load_weights(None)
    make_wrapper(tmp_path, 1, cpu_save=True).load_weights_from_tensors(*Weights.random(1).matrices())
    with pytest.raises(KtkArgumentError, match="layer 2"):
        make_wrapper(tmp_path, 2).load_weights(None)


# ---- checkpoints -----------------------------------------------------------------------------------

PATTERNS = {
    "qwen": "model.layers.{layer}.mlp.experts.{expert}.{projection}.weight",
    "mixtral": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{w}.weight",
    "bare": "layers.{layer}.experts.{expert}.{w}.weight",
    "ffn": "model.layers.{layer}.ffn.experts.{expert}.{w}.weight",
    "language": "language_model.model.layers.{layer}.mlp.experts.{expert}.{projection}.weight",
    "multimodal": "model.language_model.layers.{layer}.mlp.experts.{expert}.{projection}.weight",
}


def separate_tensors(weights: Weights, layer: int, pattern: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for expert in range(len(weights.gate)):
        for projection, w, matrix in (
            ("gate_proj", "w1", weights.gate),
            ("up_proj", "w3", weights.up),
            ("down_proj", "w2", weights.down),
        ):
            name = pattern.format(layer=layer, expert=expert, projection=projection, w=w)
            tensors[name] = matrix[expert].contiguous()
    return tensors


def write(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    directory.mkdir(exist_ok=True)
    other = {
        "model.embed_tokens.weight": torch.zeros(2, 80),
        "model.layers.0.mlp.gate.weight": torch.zeros(4, 80),
    }
    tensors = {**other, **tensors}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def assert_reads(path: Path, layer_idx: int, weights: Weights) -> None:
    with Checkpoint(path) as checkpoint:
        layer = checkpoint.layer(layer_idx)
        assert layer.num_experts == len(weights.gate)
        assert (layer.intermediate_size, layer.hidden_size) == tuple(weights.gate.shape[1:])
        for index, expert in enumerate(layer.experts()):
            assert torch.equal(expert.gate, weights.gate[index])
            assert torch.equal(expert.up, weights.up[index])
            assert torch.equal(expert.down, weights.down[index])
            for name, bias in weights.biases().items():
                found = getattr(expert, name)
                assert (found is None) == (bias is None)
                assert bias is None or torch.equal(found, bias[index])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
def test_names_of_checkpoints(tmp_path: Path, pattern: str, shards: int) -> None:
    weights = {3: Weights.random(1), 11: Weights.random(2)}
    tensors = {}
    for layer, each in weights.items():
        tensors.update(separate_tensors(each, layer, pattern))
    path = write(tmp_path / "model", tensors, shards)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.layers == (3, 11)
    for layer, each in weights.items():
        assert_reads(path, layer, each)


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(80, 48), (64, 64), (64, 32), (32, 64)])
def test_fused_tensors(tmp_path: Path, hidden: int, inner: int, transposed: bool, suffix: str) -> None:
    weights = Weights.random(1, hidden=hidden, inner=inner)
    gate_up, down = torch.cat([weights.gate, weights.up], dim=1), weights.down
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    base = "model.layers.2.mlp.experts."
    path = write(
        tmp_path / "model", {f"{base}gate_up_proj{suffix}": gate_up, f"{base}down_proj{suffix}": down}
    )
    assert_reads(path, 2, weights)


def test_fused_tensors_with_biases_alternate(tmp_path: Path) -> None:
    weights = Weights.random(1, bias=True)
    assert weights.gate_bias is not None and weights.up_bias is not None and weights.down_bias is not None
    gate_up = torch.stack([weights.gate, weights.up], dim=2).flatten(1, 2)
    base = "model.layers.2.mlp.experts."
    tensors = {
        f"{base}gate_up_proj": gate_up.transpose(1, 2).contiguous(),
        f"{base}gate_up_proj_bias": torch.stack([weights.gate_bias, weights.up_bias], dim=2).flatten(1),
        f"{base}down_proj": weights.down.transpose(1, 2).contiguous(),
        f"{base}down_proj_bias": weights.down_bias,
    }
    path = write(tmp_path / "model", tensors)
    assert_reads(path, 2, weights)
    inputs = batch(2, 5)
    with Experts.from_checkpoint(
        path, layer_idx=2, num_experts_per_tok=2, format="int8", threads=1
    ) as experts:
        assert_matches(experts(*inputs), weights.reference(form_of("int8")), *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_layers_from_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = Weights.random(1, dtype=dtype)
    path = write(tmp_path / "model", separate_tensors(weights, 2, PATTERNS["qwen"]), 2)
    inputs = batch(2, 5)
    with Experts.from_checkpoint(
        path, layer_idx=2, num_experts_per_tok=2, format="int4", threads=1
    ) as experts:
        assert experts.config.layer_idx == 2
        assert_matches(experts(*inputs), weights.reference(form_of("int4")), *inputs)
    wrapper = make_wrapper(path, cpu_save=True)
    order = torch.tensor([1, 0, 3, 2])
    wrapper.load_weights(order)
    reference = weights.reference(form_of("int4"), order=order.tolist())
    assert_wrapper_matches(wrapper.forward(*inputs), reference, *inputs)
    assert packed_path(path, "int4", 2).exists()
    # From now on the packed file is read, and the checkpoint can still be.
    wrapper.load_weights(order)
    assert_wrapper_matches(wrapper.forward(*inputs), reference, *inputs)
    assert_reads(path, 2, weights)


def test_layers_beside_those_of_the_model_are_left_out(tmp_path: Path) -> None:
    weights = [Weights.random(seed) for seed in range(3)]
    tensors = separate_tensors(weights[2], 0, "mtp.layers.{layer}.mlp.experts.{expert}.{projection}.weight")
    for layer in range(2):
        tensors.update(separate_tensors(weights[layer], layer, PATTERNS["qwen"]))
    path = write(tmp_path / "model", tensors)
    assert_reads(path, 0, weights[0])
    assert_reads(path, 1, weights[1])


def test_the_configuration_of_a_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "model", separate_tensors(Weights.random(1), 0, PATTERNS["qwen"]))
    assert Checkpoint(path).config == {}
    (path / "config.json").write_text('{"num_experts_per_tok": 2}')
    assert Checkpoint(path).config == {"num_experts_per_tok": 2}
    assert_reads(path / "model.safetensors", 0, Weights.random(1))


def test_checkpoints_that_change_are_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "model", separate_tensors(Weights.random(1), 0, PATTERNS["qwen"]))
    assert Checkpoint(path).layers == (0,)
    write(path, separate_tensors(Weights.random(1), 13, PATTERNS["qwen"]))
    assert Checkpoint(path).layers == (13,)


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    good = separate_tensors(Weights.random(1), 2, PATTERNS["qwen"])

    def case(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        return write(tmp_path / name, tensors)

    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KtkArgumentError, match=r"no \*\.safetensors"):
        Checkpoint(tmp_path / "empty")
    with pytest.raises(KtkArgumentError, match="no tensors of mixture-of-experts"):
        Checkpoint(case("dense", {}))
    with pytest.raises(KtkArgumentError, match="no experts in layer 1"):
        Checkpoint(case("good", good)).layer(1)

    quantised = {**good, "model.layers.2.mlp.experts.0.gate_proj.weight_packed": torch.ones(1, 1)}
    with pytest.raises(KtkUnsupportedError, match="quantised"):
        Checkpoint(case("packed", quantised)).layer(2)
    integers = {
        **good,
        "model.layers.2.mlp.experts.0.gate_proj.weight": torch.zeros(48, 80, dtype=torch.int8),
    }
    with pytest.raises(KtkUnsupportedError, match="int8"):
        Checkpoint(case("integers", integers)).layer(2).expert(0)

    lacking = {name: tensor for name, tensor in good.items() if ".experts.1." not in name}
    with pytest.raises(KtkArgumentError, match="some are missing"):
        Checkpoint(case("lacking", lacking)).layer(2)
    lacking = {name: tensor for name, tensor in good.items() if not name.endswith("3.down_proj.weight")}
    with pytest.raises(KtkArgumentError, match="lacks"):
        Checkpoint(case("projection", lacking)).layer(2).expert(3)
    uneven = {**good, "model.layers.2.mlp.experts.3.up_proj.weight": torch.zeros(40, 80)}
    with pytest.raises(KtkArgumentError, match="should have the shape"):
        Checkpoint(case("uneven", uneven)).layer(2).expert(3)
    base = "model.layers.2.mlp.experts."
    misfit = {f"{base}gate_up_proj": torch.zeros(4, 96, 80), f"{base}down_proj": torch.zeros(4, 80, 50)}
    with pytest.raises(KtkArgumentError, match="do not go together"):
        Checkpoint(case("misfit", misfit)).layer(2)

    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(KtkArgumentError, match="cannot be read"):
        Checkpoint(tmp_path / "garbage")
    sharded = write(tmp_path / "sharded", good, 2)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(KtkArgumentError, match="which is missing"):
        Checkpoint(sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(KtkArgumentError, match="not an index"):
        Checkpoint(sharded)

    with Checkpoint(tmp_path / "good") as checkpoint:
        layer = checkpoint.layer(2)
        with pytest.raises(KtkArgumentError, match="expert"):
            layer.expert(4)
    with pytest.raises(KtkStateError, match="closed"):
        layer.expert(0)


def test_checkpoint_of_other_shapes(tmp_path: Path) -> None:
    path = write(tmp_path / "model", separate_tensors(Weights.random(1, hidden=64), 2, PATTERNS["qwen"]))
    with pytest.raises(KtkArgumentError, match="hidden_size 64"):
        make_wrapper(path).load_weights(None)
