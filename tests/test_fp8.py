"""Weights that come in e4m3 with a scale for each block: taken as they are, and never more than a rounding
away from a layer of bf16."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from ktk import Experts, _native
from ktk.errors import KtkArgumentError, KtkStateError, KtkUnsupportedError
from ktk.weights import Checkpoint
from layers import NativeLayer, Options, pool_of, same_bits
from native_sft import POLICIES, NativeTrainer, make_adapters
from reference.packing import ExpertWeights, Format
from reference.quantise import BlockScaled, e4m3_values
from reference.rounding import BF16, F32Array
from reference.sft import LORA_NAMES
from strategies import make_input, make_routing
from torch_layers import batch

FP8, BF16_FORMAT = Format(_native.FORMAT_FP8, 128), Format(_native.FORMAT_BF16)
HIDDEN, INNER, EXPERTS = 200, 300, 3
FINITE = np.array([code for code in range(256) if code & 127 != 127], np.uint8)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix as checkpoints hold it: codes (rows, columns), a scale for each block of 128 by 128."""

    codes: npt.NDArray[np.uint8]
    scale: F32Array

    @classmethod
    def random(cls, rng: np.random.Generator, rows: int, columns: int) -> Blocks:
        shape = -(-rows // 128), -(-columns // 128)
        scale = np.exp2(rng.uniform(-13, -9, shape)).astype(np.float32)
        scale[0, 0] *= -1
        return cls(rng.choice(FINITE, (rows, columns)), scale)

    def values(self) -> F32Array:
        """The weights, rounded to bf16."""
        by_row = np.repeat(self.scale, 128, axis=0)[: self.codes.shape[0]]
        return BlockScaled(self.codes, by_row).values()


Expert = tuple[Blocks, Blocks, Blocks]


def make_experts(seed: int = 0, hidden: int = HIDDEN, inner: int = INNER) -> list[Expert]:
    rng = np.random.default_rng(seed)
    shapes = (inner, hidden), (inner, hidden), (hidden, inner)
    return [
        tuple(Blocks.random(rng, *shape) for shape in shapes)  # type: ignore[misc]
        for _ in range(EXPERTS)
    ]


def as_bf16(expert: Expert) -> ExpertWeights:
    return ExpertWeights(*(matrix.values().astype(BF16) for matrix in expert))


def pack(moe: _native.Moe, index: int, expert: Expert) -> None:
    moe.pack_expert(
        index,
        _native.DTYPE_F8_E4M3,
        *(matrix.codes.ctypes.data for matrix in expert),
        gate_scale_ptr=expert[0].scale.ctypes.data,
        up_scale_ptr=expert[1].scale.ctypes.data,
        down_scale_ptr=expert[2].scale.ctypes.data,
    )


def unpacked(layer: NativeLayer, index: int) -> list[F32Array]:
    inner, hidden = layer.intermediate_size, layer.hidden_size
    found = [np.empty(shape, np.float32) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]
    layer.moe.unpack_expert(index, *(matrix.ctypes.data for matrix in found))
    return found


def test_every_code_has_its_value(isa: str, pool: _native.Pool) -> None:
    exact = e4m3_values(FINITE)
    assert exact.min() == -448 and exact.max() == 448 and 2.0**-9 in exact
    assert np.array_equal(torch.from_numpy(FINITE).view(torch.float8_e4m3fn).float().numpy(), exact)
    codes = np.resize(FINITE, (48, 254))
    ones = np.ones((1, 2), np.float32)
    down = Blocks(np.ascontiguousarray(codes.T), np.ascontiguousarray(ones.T))
    expert = Blocks(codes, ones), Blocks(codes, 2 * ones), down
    with NativeLayer(pool, [as_bf16(expert)], FP8, Options(isa=isa), load=False) as layer:
        pack(layer.moe, 0, expert)
        gate, up, down_found = unpacked(layer, 0)
    assert same_bits(gate, np.resize(exact, gate.shape))
    assert same_bits(up, 2 * gate)
    assert same_bits(down_found, np.ascontiguousarray(gate.T))


@pytest.mark.parametrize("threads", [(2,), (1, 1, 1)])
def test_the_layer_is_that_of_the_same_weights_in_bf16(isa: str, threads: tuple[int, ...]) -> None:
    """Bit for bit, forward and back: scale, rounding and product are the same operations."""
    experts = make_experts()
    wide = [as_bf16(expert) for expert in experts]
    rng = np.random.default_rng(3)
    adapters = make_adapters(rng, EXPERTS, HIDDEN, INNER, 8, dropout=0.25, seed=5)
    with (
        pool_of(*threads) as pool,
        NativeLayer(pool, wide, FP8, Options(isa=isa), load=False) as layer,
        NativeLayer(pool, wide, BF16_FORMAT, Options(isa=isa)) as same,
    ):
        for index, expert in enumerate(experts):
            pack(layer.moe, index, expert)
            for found, expected in zip(unpacked(layer, index), unpacked(same, index), strict=True):
                assert same_bits(found, expected)
        for tokens in (1, 2, 7, 16, 45, 150):
            x = make_input(rng, tokens, HIDDEN, BF16)
            ids, weights = make_routing(rng, "distinct", tokens, EXPERTS, 2)
            assert same_bits(layer.forward(x, ids, weights), same.forward(x, ids, weights))
            grad = rng.standard_normal((tokens, HIDDEN)).astype(np.float32)
            for policy in POLICIES:
                results = []
                for made in (layer, same):
                    output, saved = NativeTrainer(made, adapters).forward(x, ids, weights, policy)
                    results.append((output, saved.backward(grad)))
                (output, found), (other, expected) = results
                assert same_bits(output, other)
                assert same_bits(found.input, expected.input)
                assert same_bits(found.weights, expected.weights)
                for name in LORA_NAMES:
                    assert same_bits(found.lora[name], expected.lora[name]), name


def test_packed_parts_survive_export_and_shards() -> None:
    experts = make_experts()
    wide = [as_bf16(expert) for expert in experts]
    parts = []
    for threads in ((1,), (1, 1), (1, 1, 1)):
        with pool_of(*threads) as pool, NativeLayer(pool, wide, FP8, load=False) as layer:
            pack(layer.moe, 0, experts[0])
            parts.append(layer.export(0))
            layer.load(1, parts[0])
            for name, part in layer.export(1).items():
                assert np.array_equal(part, parts[0][name]), name
    for other in parts[1:]:
        for name, part in other.items():
            assert np.array_equal(part, parts[0][name]), name


def test_wrong_weights_are_refused(pool: _native.Pool) -> None:
    experts = make_experts()
    wide = [as_bf16(expert) for expert in experts]
    gate, up, down = experts[0]

    def refused(
        layer: NativeLayer,
        expert: Expert,
        message: str,
        dtype: int = _native.DTYPE_F8_E4M3,
        **changes: int,
    ) -> None:
        scales = {
            f"{name}_scale_ptr": matrix.scale.ctypes.data
            for name, matrix in zip(("gate", "up", "down"), expert, strict=True)
        }
        pointers = [matrix.codes.ctypes.data for matrix in expert]
        with pytest.raises(KtkArgumentError, match=message):
            layer.moe.pack_expert(0, dtype, *pointers, **{**scales, **changes})
        x, ids = np.ones((1, HIDDEN), np.float32), np.zeros((1, 1), np.int64)
        with pytest.raises(KtkStateError):
            layer.forward(x, ids, np.ones((1, 1), np.float32))

    with NativeLayer(pool, wide, FP8, load=False) as layer:
        for code in (0x7F, 0xFF):
            broken = down.codes.copy()
            broken[-1, -1] = code
            refused(layer, (gate, up, Blocks(broken, down.scale)), "NaN or infinity")
        for value in (np.nan, np.inf, 1e37):
            scale = up.scale.copy()
            scale[-1, -1] = value
            refused(layer, (gate, Blocks(up.codes, scale), down), "bf16 cannot hold")
        refused(layer, experts[0], "scales of the up weights are null", up_scale_ptr=0)
        refused(layer, experts[0], "aligned", down_scale_ptr=down.scale.ctypes.data + 2)
        refused(layer, experts[0], "must be null", dtype=_native.DTYPE_F16)
        refused(layer, experts[0], r"DTYPE_F8_E4M3 \(3\), got 4", dtype=4)
    for form in (BF16_FORMAT, Format(_native.FORMAT_INT8)):
        with NativeLayer(pool, wide, form, load=False) as layer:
            refused(layer, experts[0], "only a layer of format fp8")


# ---- torch tensors and checkpoints -----------------------------------------------------------------


def stacked(experts: list[Expert], which: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales of all experts, and the weights they stand for in bf16."""
    codes = torch.from_numpy(np.stack([expert[which].codes for expert in experts]))
    scale = torch.from_numpy(np.stack([expert[which].scale for expert in experts]))
    values = torch.from_numpy(np.stack([expert[which].values() for expert in experts]))
    return codes.view(torch.float8_e4m3fn), scale, values.bfloat16()


def test_tensors_in_every_format() -> None:
    experts = make_experts(hidden=80, inner=144)
    (gate, gate_scale, gate_wide), (up, up_scale, up_wide), (down, down_scale, down_wide) = (
        stacked(experts, which) for which in range(3)
    )
    inputs = batch(2, 6, EXPERTS, 2, 80)
    scales = {"gate_scale": gate_scale, "up_scale": up_scale, "down_scale": down_scale}
    options: dict[str, Any] = {"num_experts_per_tok": 2, "threads": 1}
    with Experts.from_weights(gate_wide, up_wide, down_wide, format="bf16", **options) as layer:
        expected = layer(*inputs)
    for form in ("fp8", "bf16"):
        with Experts.from_weights(gate, up, down, format=form, **scales, **options) as layer:
            assert torch.equal(layer(*inputs), expected)
            doubled = {name: 2 * scale for name, scale in scales.items()}
            layer.load_tensors(gate, up, down, **doubled)
            assert not torch.equal(layer(*inputs), expected)
    # Scales of these blocks are up to 16 times apart, more than groups that span several are made for.
    for form, group, most in (("int8", 128, 0.03), ("int4", 32, 0.2)):
        with Experts.from_weights(
            gate, up, down, format=form, group_size=group, **scales, **options
        ) as layer:
            error = torch.linalg.norm(layer(*inputs) - expected) / torch.linalg.norm(expected)
            assert 0 < error < most
    with pytest.raises(KtkArgumentError, match="up_scale and weights of float8_e4m3fn belong together"):
        Experts.from_weights(gate, up, down, format="fp8", **{**scales, "up_scale": None}, **options)
    with pytest.raises(KtkArgumentError, match="belong together"):
        Experts.from_weights(gate_wide, up_wide, down_wide, format="fp8", **scales, **options)
    with pytest.raises(KtkArgumentError, match=r"down_scale must have the shape \[3, 1, 2\]"):
        Experts.from_weights(
            gate, up, down, format="fp8", **{**scales, "down_scale": torch.ones(3, 2, 1)}, **options
        )
    with pytest.raises(KtkArgumentError, match="dtype of gate"):
        Experts.from_weights(gate, up_wide, down, format="fp8", **scales, **options)


def checkpoint(folder: Path, experts: list[Expert], **config: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for index, expert in enumerate(experts):
        for name, matrix in zip(("gate_proj", "up_proj", "down_proj"), expert, strict=True):
            base = f"model.layers.3.mlp.experts.{index}.{name}.weight"
            tensors[base] = torch.from_numpy(matrix.codes).view(torch.float8_e4m3fn)
            tensors[f"{base}_scale_inv"] = torch.from_numpy(matrix.scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_checkpoints_with_block_scales(tmp_path: Path) -> None:
    experts = make_experts(hidden=80, inner=144)
    block = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    folder = checkpoint(tmp_path / "deepseek", experts, **block)
    with Checkpoint(folder) as opened:
        layer = opened.layer(3)
        assert layer.block_scales and (layer.hidden_size, layer.intermediate_size) == (80, 144)
        weights = layer.expert(1)
        assert weights.down.dtype == torch.float8_e4m3fn and weights.down_scale is not None
        wide = weights.dequantised()
        assert torch.equal(wide.down.bfloat16(), stacked(experts, 2)[2][1])
    inputs = batch(2, 6, EXPERTS, 2, 80)
    options: dict[str, Any] = {"layer_idx": 3, "num_experts_per_tok": 2, "threads": 1}
    with Experts.from_checkpoint(folder, format="bf16", **options) as layer_bf16:
        expected = layer_bf16(*inputs)
    with Experts.from_checkpoint(folder, format="fp8", **options) as fp8:
        assert torch.equal(fp8(*inputs), expected)
        fp8.save(tmp_path / "packed.safetensors")
    with Experts.from_packed(tmp_path / "packed.safetensors", threads=1) as packed:
        assert packed.config.format == "fp8"
        assert torch.equal(packed(*inputs), expected)


def test_checkpoints_of_other_blocks_are_refused(tmp_path: Path) -> None:
    experts = make_experts(hidden=80, inner=144)
    other = {"quantization_config": {"weight_block_size": [64, 64]}}
    with (
        Checkpoint(checkpoint(tmp_path / "other", experts, **other)) as opened,
        pytest.raises(KtkUnsupportedError, match="128 by 128"),
    ):
        opened.layer(3)
    wrong = [(gate, up, Blocks(down.codes, down.scale.repeat(2, 0))) for gate, up, down in experts]
    with (
        Checkpoint(checkpoint(tmp_path / "wrong", wrong)) as opened,
        pytest.raises(KtkArgumentError, match="should have the shape"),
    ):
        opened.layer(3).expert(0)
