"""Weights that kt-kernel has quantised: ``.kt`` files and merged safetensors, against files written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kt_kernel_files import Quantised, StoredLayer
from ktk import CPUInfer, Experts, KTMoEWrapper, WorkerPoolConfig
from ktk.config import LayerConfig
from ktk.errors import KtkArgumentError, KtkUnsupportedError
from ktk.sft import load_experts_from_kt_weight_path
from ktk.weights import KTKernelWeights, PackedLayer
from ktk.weights.kt_kernel_tiles import codes_of
from reference.moe import Layer
from reference.packing import (
    ExpertWeights,
    Format,
    _by_row_block,
    _bytes,
    _factors,
    _stored_scale,
    pack_weight,
)
from reference.quantise import QuantisedMatrix
from reference.rounding import round_bf16
from torch_layers import Weights, assert_matches, assert_wrapper_matches, batch

pytestmark = pytest.mark.filterwarnings("ignore:NUMA node:RuntimeWarning")

METHODS = {"int8": "AMXINT8", "int4": "AMXINT4"}


def layer_of(fmt: str, parts: int = 1, **sizes: int) -> StoredLayer:
    """Random experts. Scales of int4 halve from part to part, which factors of groups express exactly."""
    weights = Weights.random(3, **{"experts": 3, "hidden": 256, "inner": 256, **sizes})
    stored = StoredLayer.of(*weights.matrices(), fmt, parts)
    if fmt == "int4":
        for number, experts in enumerate(stored.parts):
            for expert, first in zip(experts, stored.parts[0], strict=True):
                expert["down"].scales[:] = first["down"].scales * np.float32(2.0**-number)
    return stored


def matrix_of(stored: StoredLayer, expert: int, projection: str, group: int) -> QuantisedMatrix:
    """A stored matrix as one of ktk with the same codes: int8 with scales of groups rounded to bf16, int4
    with multipliers of the last part's scale."""
    pieces = [part[expert][projection] for part in stored.parts]
    down = projection == "down"
    codes = np.concatenate([piece.codes for piece in pieces], axis=1 if down else 0).astype(np.int16)
    groups = -(-codes.shape[1] // group) if group else 1
    if down:
        scales = np.repeat(
            np.stack([piece.scales for piece in pieces], axis=1), groups // len(pieces), axis=1
        )
    else:
        scales = np.repeat(np.concatenate([piece.scales for piece in pieces])[:, None], groups, axis=1)
    if stored.fmt == "int8":
        return QuantisedMatrix(codes, round_bf16(scales) if group else scales, group)
    least = scales[:, -1:] * np.float32(16)
    if not group:
        return QuantisedMatrix(codes, least, 0, (codes + 8).astype(np.uint8))
    multipliers = (16 * scales / least).astype(np.uint8)
    integers = codes * np.repeat(multipliers, group, axis=1)[:, : codes.shape[1]].astype(np.int16)
    factors = np.stack([multipliers, 128 - 8 * multipliers], axis=2).astype(np.uint8)
    return QuantisedMatrix(integers, least, 0, (codes + 8).astype(np.uint8), factors)


def expected_parts(stored: StoredLayer, expert: int, group: int) -> dict[str, np.ndarray]:
    form = Format(1 if stored.fmt == "int8" else 2, group)
    gate, up, down = (matrix_of(stored, expert, name, group) for name in ("gate", "up", "down"))
    parts = {
        "gate_up.weight": _bytes(np.stack([pack_weight(gate, form), pack_weight(up, form)], axis=2)),
        "down.weight": _bytes(pack_weight(down, form)),
        "gate_up.scale": _bytes(np.stack([_by_row_block(_stored_scale(m)) for m in (gate, up)], axis=2)),
        "down.scale": _bytes(_by_row_block(_stored_scale(down))),
    }
    if down.factors is not None:
        parts["gate_up.factors"] = _bytes(np.stack([_factors(gate), _factors(up)], axis=2))
        parts["down.factors"] = _bytes(_factors(down))
    return parts


def assert_holds(experts: Experts, stored: StoredLayer, file: Path) -> None:
    """Every packed byte of the layer is the one that the stored codes and scales make."""
    experts.save(file)
    config = experts.config
    with safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    for expert in range(config.num_experts):
        expected = expected_parts(stored, expert, config.groups)
        assert {f"layers.{config.layer_idx}.experts.{part}" for part in expected} == set(tensors)
        for part, wanted in expected.items():
            actual = tensors[f"layers.{config.layer_idx}.experts.{part}"][expert]
            actual = actual.contiguous().view(torch.uint8).flatten()
            assert np.array_equal(actual.numpy(), wanted), (part, expert)


# ---- exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 128, "inner": 128},
        # One past whole blocks of rows, and two blocks of columns, in both directions.
        {"hidden": 3584 + 128, "inner": 128 + 128, "experts": 1},
        {"hidden": 160 + 96, "inner": 3584 + 256, "experts": 1},
        {"hidden": 2 * 3584 + 128, "inner": 128, "experts": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_one_part_is_exact(tmp_path: Path, fmt: str, sizes: dict[str, int], merged: bool) -> None:
    stored = layer_of(fmt, **sizes)
    if merged:
        stored.write_merged(tmp_path / "model-00001-of-00001.safetensors", 5)
    else:
        stored.write_files(tmp_path, 5)
    with KTKernelWeights(tmp_path) as weights:
        assert weights.layers == (5,)
        layer = weights.layer(5)
        assert (layer.format, layer.parts, layer.group_size) == (fmt, 1, 0)
        for expert in range(layer.num_experts):
            read = layer.expert(expert)
            for name in ("gate", "up", "down"):
                assert torch.equal(getattr(read, name), stored.values(name)[expert])
    with Experts.from_checkpoint(tmp_path, layer_idx=5, num_experts_per_tok=1, threads=1) as experts:
        assert (experts.config.format, experts.config.groups, experts.config.rotated) == (fmt, 0, False)
        assert_holds(experts, stored, tmp_path / "packed" / "layer.safetensors")


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_several_parts_keep_every_code(tmp_path: Path, fmt: str, parts: int) -> None:
    stored = layer_of(fmt, parts, inner=128 * parts)
    stored.write_files(tmp_path, 0)
    with Experts.from_checkpoint(tmp_path, layer_idx=0, num_experts_per_tok=2, threads=1) as experts:
        assert experts.config.groups == 128
        assert_holds(experts, stored, tmp_path / "packed" / "layer.safetensors")


@pytest.mark.parametrize("parts", [2, 4])
def test_int4_parts_of_any_scales(tmp_path: Path, parts: int) -> None:
    """gate and up are exact. Down is closer to the files than with one scale a row, and no weight is further
    away than half a step of the largest scale."""
    weights = Weights.random(3, experts=2, hidden=256, inner=128 * parts)
    stored = StoredLayer.of(*weights.matrices(), "int4", parts)
    rng = np.random.default_rng(parts)
    for experts in stored.parts:
        for expert in experts:
            expert["down"].scales *= np.exp2(-5 * rng.random(256)).astype(np.float32)
    stored.parts[0][0]["down"].scales[::7] = 0
    stored.write_files(tmp_path, 0)
    layer = KTKernelWeights(tmp_path).layer(0)
    for expert in range(2):
        distances = []
        for group in (0, 64, 128):
            config = LayerConfig(
                num_experts=2,
                num_experts_per_tok=1,
                hidden_size=256,
                intermediate_size=128 * parts,
                format="int4",
                group_size=group,
                rotated=False,
            )
            found = layer.packed(expert, PackedLayer.from_config(config, bias=False))
            assert found is not None
            for name in ("gate", "up"):
                which = 0 if name == "gate" else 1
                codes = codes_of(np.ascontiguousarray(found["gate_up.weight"][:, :, which]), "int4")
                scale = found["gate_up.scale"][:, 0, which].reshape(-1, 1)
                exact = stored.values(name)[expert].numpy()
                assert np.array_equal(codes * scale, exact)
            if group:
                factors = found["gate_up.factors"]
                assert (factors[..., 0, :] == 1).all() and (factors[..., 1, :] == 120).all()
            values = down_of(found, group)
            scales = 16 * np.stack([part[expert]["down"].scales for part in stored.parts])
            difference = np.abs(values - stored.values("down")[expert].double().numpy())
            assert (difference <= 0.5001 * scales.max(axis=0)[:, None]).all()
            distances.append(np.linalg.norm(difference))
        assert distances[1] == distances[2] < 0.5 * distances[0]


def down_of(parts: dict[str, np.ndarray], group: int) -> np.ndarray:
    """Values of down, int4, by ``scale * (multiplier * code + offset - 128)``."""
    stored = codes_of(parts["down.weight"], "int4").astype(np.float64) + 8
    rows, columns = stored.shape
    multiplier, offset = np.ones((rows, columns)), np.full((rows, columns), 120)
    if group:
        both = parts["down.factors"].transpose(2, 0, 3, 1).reshape(2, rows, -1)
        multiplier, offset = np.repeat(both, group, axis=2).astype(np.float64)
        assert (15 * multiplier + offset <= 255).all() and (multiplier >= 1).all()
    return parts["down.scale"].reshape(rows, 1) * (multiplier * stored + offset - 128)


def test_parts_of_64_columns(tmp_path: Path) -> None:
    stored = layer_of("int8", 3, inner=192, hidden=64)
    stored.write_files(tmp_path, 0)
    with Experts.from_checkpoint(tmp_path, layer_idx=0, num_experts_per_tok=2, threads=1) as experts:
        assert experts.config.groups == 64
        assert_holds(experts, stored, tmp_path / "packed" / "layer.safetensors")


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_parts_whose_scales_agree_are_exact_by_rows(tmp_path: Path, fmt: str) -> None:
    stored = layer_of(fmt, 2)
    for expert, other in zip(*stored.parts, strict=True):
        other["down"].scales[:] = expert["down"].scales
    stored.write_files(tmp_path, 0)
    options: dict[str, Any] = {"group_size": 0, "num_experts_per_tok": 2, "threads": 1}
    with Experts.from_checkpoint(tmp_path, layer_idx=0, format=fmt, **options) as experts:
        experts.save(tmp_path / "two.safetensors")
    joined = StoredLayer(
        fmt,
        [
            [
                {
                    name: Quantised(
                        np.concatenate([one[name].codes, two[name].codes], axis=1 if name == "down" else 0),
                        one[name].scales
                        if name == "down"
                        else np.concatenate([one[name].scales, two[name].scales]),
                    )
                    for name in one
                }
                for one, two in zip(*stored.parts, strict=True)
            ]
        ],
    )
    joined.write_files(tmp_path / "joined", 0)
    with Experts.from_checkpoint(tmp_path / "joined", layer_idx=0, format=fmt, **options) as experts:
        experts.save(tmp_path / "one.safetensors")
    one, two = ((tmp_path / name).read_bytes() for name in ("one.safetensors", "two.safetensors"))
    begin = int.from_bytes(one[:8], "little")
    assert one[begin + 8 :] == two[begin + 8 :]


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_one_scale_for_several_parts_is_the_largest(tmp_path: Path, fmt: str) -> None:
    """Of down; gate and up stay exact. No weight moves by more than half a step of its row."""
    stored = layer_of(fmt, 2)
    stored.write_files(tmp_path, 0)
    layer = KTKernelWeights(tmp_path).layer(0)
    config = LayerConfig(
        num_experts=3,
        num_experts_per_tok=1,
        hidden_size=256,
        intermediate_size=256,
        format=fmt,
        group_size=0,
        rotated=False,
    )
    header = PackedLayer.from_config(config, bias=False)
    step = 1 if fmt == "int8" else 16
    for expert in range(3):
        parts = layer.packed(expert, header)
        assert parts is not None
        scales = np.stack([part[expert]["down"].scales for part in stored.parts]).max(axis=0) * np.float32(
            step
        )
        assert np.array_equal(parts["down.scale"].reshape(-1), scales)
        exact = expected_parts(stored, expert, 128)
        assert np.array_equal(_bytes(parts["gate_up.weight"]), exact["gate_up.weight"])
    with Experts(config, threads=1) as experts:
        experts.load_checkpoint(tmp_path)
        x, ids, weights = torch.eye(256), torch.zeros(256, 1, dtype=torch.int64), torch.ones(256, 1)
        assert experts(x, ids, weights).isfinite().all()
    parts = layer.packed(1, header)
    assert parts is not None
    values = codes_of(parts["down.weight"], fmt).astype(np.float64) * parts["down.scale"].reshape(-1, 1)
    difference = np.abs(values - stored.values("down")[1].double().numpy())
    assert (difference <= 0.5001 * parts["down.scale"].reshape(-1, 1)).all() and difference.max() > 0


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_other_formats_take_the_values(tmp_path: Path, fmt: str) -> None:
    stored = layer_of(fmt, 2)
    stored.write_files(tmp_path, 0)
    tensors = [stored.values(name) for name in ("gate", "up", "down")]
    other = "int4" if fmt == "int8" else "int8"
    for options in (
        {"format": "bf16"},
        {"format": other},
    ):
        with (
            Experts.from_checkpoint(
                tmp_path, layer_idx=0, num_experts_per_tok=2, threads=1, **options
            ) as read,
            Experts.from_weights(*tensors, num_experts_per_tok=2, threads=1, **options) as made,
        ):
            read.save(tmp_path / "read.safetensors")
            made.save(tmp_path / "made.safetensors", source="")
        assert (tmp_path / "read.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_rotated_layers_take_the_values(tmp_path: Path, fmt: str) -> None:
    """Codes of rotated columns are others, so that everything is quantised again."""
    stored = layer_of(fmt, 2)
    stored.write_files(tmp_path, 0)
    options: dict[str, Any] = {"num_experts_per_tok": 2, "rotated": True, "threads": 1, "format": fmt}
    tensors = [stored.values(name) for name in ("gate", "up", "down")]
    with (
        Experts.from_checkpoint(tmp_path, layer_idx=0, **options) as read,
        Experts.from_weights(*tensors, **options) as made,
    ):
        assert read.config == made.config
        read.save(tmp_path / "read.safetensors")
        made.save(tmp_path / "made.safetensors")
    assert (tmp_path / "read.safetensors").read_bytes() == (tmp_path / "made.safetensors").read_bytes()


def test_wide_groups_of_plain_layers(tmp_path: Path) -> None:
    """Groups of down are those of 128 columns, which divide a part."""
    stored = layer_of("int8", 2)
    stored.write_files(tmp_path, 0)
    with Experts.from_checkpoint(
        tmp_path, layer_idx=0, num_experts_per_tok=2, group_size=512, threads=1
    ) as experts:
        assert not experts.config.rotated
        experts.save(tmp_path / "packed" / "layer.safetensors")
    with safe_open(tmp_path / "packed" / "layer.safetensors", framework="pt") as handle:
        down = handle.get_tensor("layers.0.experts.down.scale")
        gate_up = handle.get_tensor("layers.0.experts.gate_up.scale")
    assert down.shape[2] == 2 and gate_up.shape[2] == 1
    for expert in range(3):
        wanted = expected_parts(stored, expert, 128)["down.scale"]
        assert np.array_equal(down[expert].contiguous().view(torch.uint8).flatten().numpy(), wanted)


# ---- through the wrappers --------------------------------------------------------------------------------


def wrapper_of(path: Path, fmt: str, **changes: Any) -> Any:
    sizes = {
        "layer_idx": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "cpuinfer_threads": 1,
        "chunked_prefill_size": 64,
        "weight_path": path,
        "method": METHODS[fmt],
    }
    return KTMoEWrapper(**{**sizes, **changes})


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_inference_and_training(tmp_path: Path, fmt: str, parts: int, merged: bool) -> None:
    stored = layer_of(fmt, parts)
    if merged:
        stored.write_merged(tmp_path / "model.safetensors", 2)
    else:
        stored.write_files(tmp_path, 2)
    wrapper = wrapper_of(tmp_path, fmt)
    wrapper.load_weights(torch.tensor([2, 0, 1]))
    config = wrapper.experts.config
    assert config.groups == (0 if parts == 1 else 128) and not config.rotated
    x, ids, weights = batch(4, 7, experts=3, hidden=256)
    reference = reference_of(stored, config.groups, [2, 0, 1])
    assert_wrapper_matches(wrapper.forward(x, ids, weights), reference, x, ids, weights)
    wrapper.close()

    trainer = wrapper_of(tmp_path, fmt, method=f"{METHODS[fmt]}_SFT", mode="sft", lora_rank=0)
    trainer.load_weights(torch.tensor([2, 0, 1]))
    assert trainer.experts.config.groups == config.groups and not trainer.experts.config.rotated
    output, saved = trainer.run(x, ids, weights, policy="save")
    assert_matches(output, reference, x, ids, weights)
    assert saved is not None
    gradients = trainer.run_backward(saved, torch.ones_like(output))
    assert gradients.hidden_states.isfinite().all() and gradients.hidden_states.abs().sum() > 0

    found = load_experts_from_kt_weight_path(tmp_path, 2, fmt)
    assert found.group_size == config.groups
    found.load_into(trainer.experts)
    identity = reference_of(stored, config.groups, [0, 1, 2])
    assert_matches(trainer.run(x, ids, weights)[0], identity, x, ids, weights)
    trainer.close()
    with pytest.raises(KtkArgumentError, match=f"no packed {'int4' if fmt == 'int8' else 'int8'} experts"):
        load_experts_from_kt_weight_path(tmp_path, 2, "int4" if fmt == "int8" else "int8")
    with pytest.raises(KtkArgumentError, match="of layer 9"):
        load_experts_from_kt_weight_path(tmp_path, 9, fmt)


def reference_of(stored: StoredLayer, group: int, order: list[int]) -> Layer:
    """Reference layer of the stored codes, slot p holding expert ``order[p]``."""
    form = Format(1 if stored.fmt == "int8" else 2, group)
    dummy = [
        ExpertWeights(*(stored.values(name)[expert].numpy() for name in ("gate", "up", "down")))
        for expert in order
    ]
    layer = Layer(dummy, form)
    for slot, expert in enumerate(order):
        made = layer.experts[slot]
        layer.experts[slot] = dataclasses.replace(
            made, **{name: matrix_of(stored, expert, name, group) for name in ("gate", "up", "down")}
        )
    return layer


def test_cpu_save_writes_a_packed_file(tmp_path: Path) -> None:
    stored = layer_of("int8")
    stored.write_files(tmp_path, 2)
    wrapper = wrapper_of(tmp_path, "int8", cpu_save=True)
    wrapper.load_weights(torch.arange(3))
    x, ids, weights = batch(4, 7, experts=3, hidden=256)
    expected = wrapper.forward(x, ids, weights).clone()
    wrapper.close()
    for folder in tmp_path.glob("_layer_*"):
        folder.rename(tmp_path / "gone")
    again = wrapper_of(tmp_path, "int8", group_size=0)
    again.load_weights(torch.arange(3))
    assert torch.equal(again.forward(x, ids, weights), expected)
    again.close()


def test_the_number_of_subpools_does_not_matter(tmp_path: Path) -> None:
    """Weights quantised for two NUMA nodes run on any number of them."""
    stored = layer_of("int8", 2)
    stored.write_files(tmp_path, 0)
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
        with Experts.from_checkpoint(tmp_path, layer_idx=0, num_experts_per_tok=2, cpu_infer=pool) as experts:
            experts.save(tmp_path / f"{count}.safetensors")
        files.append((tmp_path / f"{count}.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_checkpoint_beside_kt_files(tmp_path: Path) -> None:
    """The files are taken in their own format, the checkpoint in every other one."""
    layer_of("int8").write_files(tmp_path, 0)
    weights = Weights.random(9, experts=3, hidden=256, inner=256)
    names = {"gate_proj": weights.gate, "up_proj": weights.up, "down_proj": weights.down}
    save_file(
        {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": tensor[expert].clone()
            for name, tensor in names.items()
            for expert in range(3)
        },
        tmp_path / "model.safetensors",
    )
    x, ids, scores = batch(4, 7, experts=3, hidden=256)
    with (
        Experts.from_checkpoint(
            tmp_path, layer_idx=0, num_experts_per_tok=2, format="bf16", threads=1
        ) as read,
        Experts.from_weights(*weights.matrices(), num_experts_per_tok=2, format="bf16", threads=1) as made,
    ):
        assert torch.equal(read(x, ids, scores), made(x, ids, scores))
    with Experts.from_checkpoint(
        tmp_path, layer_idx=0, num_experts_per_tok=2, format="int8", threads=1
    ) as read:
        assert read.config.groups == 0


def test_copies_for_the_backward_are_left_out(tmp_path: Path) -> None:
    stored = layer_of("int8")
    folder = stored.write_files(tmp_path, 0)
    (folder / "_numa_0" / "INT8_gate_bwd_0_65536Byte_quant_.kt").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    assert KTKernelWeights(tmp_path).layer(0).num_experts == 3


def test_both_formats_in_one_folder(tmp_path: Path) -> None:
    for fmt in ("int8", "int4"):
        layer_of(fmt).write_files(tmp_path, 0)
    weights = KTKernelWeights(tmp_path)
    assert weights.formats(0) == ("int8", "int4") and weights.formats(1) == ()
    assert [weights.layer(0, fmt).format for fmt in ("int8", "int4")] == ["int8", "int4"]
    with pytest.raises(KtkArgumentError, match="in int4 and int8; choose one with format, got None"):
        weights.layer(0)


# ---- damaged --------------------------------------------------------------------------------------------

Damage = Callable[[Path], object]


def only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


DAMAGES: list[tuple[str, Damage, str]] = [
    (
        "part",
        lambda folder: [file.unlink() for file in (folder / "_numa_1").iterdir()],
        r"has 3 NUMA parts, and part 1 is missing; convert",
    ),
    (
        "last part",
        lambda folder: [file.unlink() for file in (folder / "_numa_2").iterdir()],
        r"has intermediate_size 256, in 2 NUMA parts, and this layer 384",
    ),
    (
        "expert",
        lambda folder: only(folder, "_numa_1/INT8_up_1_*quant_.kt").unlink(),
        r"lacks the weight of the up projection of expert 1 in NUMA part 1, of 3 experts and 3 parts",
    ),
    (
        "scale",
        lambda folder: only(folder, "_numa_0/INT8_down_2_*scale_.kt").unlink(),
        r"lacks the scale of the down projection of expert 2 in NUMA part 0",
    ),
    (
        "short",
        lambda folder: only(folder, "_numa_2/INT8_gate_0_*quant_.kt").write_bytes(b"x" * 100),
        r"_numa_2.INT8_gate_0_32768Byte_quant_.kt should have the 32768 bytes of its name, got 100; copy",
    ),
    (
        "name",
        lambda folder: only(folder, "_numa_0/INT8_gate_1_*quant_.kt").rename(
            folder / "_numa_0" / "INT8_gate_1_4096Byte_quant_.kt"
        ),
        r"INT8_gate_1_4096Byte_quant_.kt should have 32768 bytes in a layer of hidden size 256, .* got 4096",
    ),
    (
        "twice",
        lambda folder: (folder / "_numa_0" / "INT8_gate_1_64Byte_quant_.kt").write_bytes(b""),
        r"are the same matrix in two sizes; remove",
    ),
    (
        "rows",
        lambda folder: only(folder, "_numa_0/INT8_gate_0_*scale_.kt").rename(
            folder / "_numa_0" / "INT8_gate_0_40Byte_scale_.kt"
        ),
        r"hidden size 256 and 30 rows of gate in 3 NUMA parts, which do not make whole tiles of 32 rows",
    ),
    (
        "nan",
        lambda folder: only(folder, "_numa_1/INT8_down_0_*scale_.kt").write_bytes(
            np.full(256, np.nan, np.float32).tobytes()
        ),
        r"INT8_down_0_1024Byte_scale_.kt holds a scale that is negative or not finite; convert",
    ),
    (
        "negative",
        lambda folder: only(folder, "_numa_1/INT8_up_0_*scale_.kt").write_bytes(
            np.full(128, -1, np.float32).tobytes()
        ),
        r"INT8_up_0_512Byte_scale_.kt holds a scale that is negative or not finite; convert",
    ),
    (
        "code",
        lambda folder: only(folder, "_numa_1/INT8_down_0_*quant_.kt").write_bytes(b"\x80" * 32768),
        r"holds the code -128, and codes of INT8 are -127 to 127",
    ),
    (
        "nothing",
        lambda folder: [file.unlink() for file in folder.glob("*/*")],
        r"has no weights: expected files such as _numa_0/INT8_up_0_",
    ),
]


@pytest.mark.parametrize(
    ("damage", "words"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES]
)
def test_damaged_files(tmp_path: Path, damage: Damage, words: str) -> None:
    stored = layer_of("int8", 3, inner=384)
    damage(stored.write_files(tmp_path, 2))
    config = LayerConfig(
        num_experts=3,
        num_experts_per_tok=2,
        hidden_size=256,
        intermediate_size=384,
        format="int8",
        layer_idx=2,
    )
    with Experts(config, threads=1) as experts:
        with pytest.raises(KtkArgumentError, match=words):
            experts.load_checkpoint(tmp_path)
        experts.load_tensors(*Weights.random(1, experts=3, hidden=256, inner=384).matrices())


def merged(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def write(folder: Path) -> None:
        tensors = layer_of("int8", 2).tensors(2)
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (merged(lambda t: t.pop("blk.2.ffn_up_exps.1.numa.1.scale")), "lacks the scale of the up projection"),
        (
            merged(lambda t: t.update({"blk.2.ffn_up_exps.1.numa.1.scale": torch.zeros(128).bfloat16()})),
            r"ffn_up_exps.1.numa.1.scale of .* should be F32, got BF16; convert",
        ),
        (
            merged(
                lambda t: t.update({"blk.2.ffn_up_exps.1.numa.1.weight": torch.zeros(5, dtype=torch.int8)})
            ),
            r"ffn_up_exps.1.numa.1.weight of .* should have 32768 bytes in a layer .*, got 5",
        ),
    ],
)
def test_damaged_tensors(tmp_path: Path, write: Damage, words: str) -> None:
    write(tmp_path)
    with pytest.raises(KtkArgumentError, match=words):
        KTKernelWeights(tmp_path).layer(2)


def test_manifest(tmp_path: Path) -> None:
    layer_of("int8").write_files(tmp_path, 0)
    manifest = tmp_path / "kt-weight-manifest.json"
    manifest.write_text('{"layout": "kt-int8-n32-k64-vnni-v1"}')
    assert KTKernelWeights(tmp_path).layers == (0,)
    manifest.write_text('{"layout": "kt-int8-n64"}')
    with pytest.raises(KtkUnsupportedError, match="has the layout 'kt-int8-n64', and ktk reads"):
        KTKernelWeights(tmp_path)
    manifest.write_text("[]")
    with pytest.raises(KtkArgumentError, match="is not a manifest of kt-kernel"):
        KTKernelWeights(tmp_path)


def test_what_is_not_read(tmp_path: Path) -> None:
    place = tmp_path / "general" / "_layer_0" / "_numa_0"
    place.mkdir(parents=True)
    (place / "MOE_INT8_up_0_64Byte_quant_.kt").write_bytes(b"")
    with pytest.raises(KtkUnsupportedError, match=r"MOE_INT8_up_0.* in a layout that ktk does not read"):
        KTKernelWeights(tmp_path / "general").layer(0)
    awq = tmp_path / "awq"
    awq.mkdir()
    save_file({"blk.0.ffn_up_exps.0.qzeros": torch.zeros(4)}, awq / "model.safetensors")
    with pytest.raises(KtkUnsupportedError, match="AWQ converter"):
        KTKernelWeights(awq).layer(0)
    with pytest.raises(KtkArgumentError, match="has no layer 4; it has"):
        KTKernelWeights(awq).layer(4)
    save_file({"x": torch.zeros(4)}, tmp_path / "other.safetensors")
    with pytest.raises(KtkArgumentError, match="has no weights of kt-kernel: expected folders"):
        KTKernelWeights(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        KTKernelWeights(tmp_path / "none")
