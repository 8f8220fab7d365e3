"""Streams and CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ktk import Experts, KExpertsCPUBuffer, KTMoEWrapper
from ktk.errors import KtkError
from torch_layers import (
    METHOD_FORMATS,
    Weights,
    assert_matches,
    assert_wrapper_matches,
    batch,
    clean_buffers,
    form_of,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:NUMA node:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    with clean_buffers():
        yield
    torch.cuda.synchronize()


def make_wrapper(layer_idx: int = 0, weights: Weights | None = None, **options: Any) -> Any:
    wrapper = KTMoEWrapper(
        layer_idx,
        4,
        2,
        80,
        48,
        options.pop("gpu_experts_mask", None),
        2,
        1,
        "",
        64,
        **{"method": "AMXINT8", **options},
    )
    wrapper.load_weights_from_tensors(*(weights or Weights.random(1)).matrices(), torch.arange(4))
    return wrapper


def on_device(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", METHOD_FORMATS)
def test_wrapper(method: str, dtype: torch.dtype) -> None:
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights, method=method)
    stream = torch.cuda.current_stream().cuda_stream
    for tokens in (1, 9, 0):
        inputs = batch(2, tokens, dtype=dtype)
        device = on_device(inputs)
        result = wrapper.forward(*device, stream)
        assert result.is_cuda
        assert_wrapper_matches(result, weights.reference(METHOD_FORMATS[method]), *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_experts(dtype: torch.dtype) -> None:
    weights = Weights.random(1)
    with Experts.from_weights(
        *weights.matrices(), num_experts_per_tok=2, format="int8", threads=2, max_tokens=5
    ) as experts:
        for tokens in (1, 5, 13, 0):
            inputs = batch(tokens, tokens, dtype=dtype)
            device = on_device(inputs)
            result = experts(*device)
            assert result.is_cuda
            assert_matches(result, weights.reference(form_of("int8")), *inputs)
            assert torch.equal(result.cpu(), experts(*inputs))


def test_operator() -> None:
    with Experts.from_weights(
        *Weights.random(1).matrices(), num_experts_per_tok=2, format="int8", threads=2
    ) as experts:
        inputs = on_device(batch(2, 5))
        torch.library.opcheck(torch.ops.ktk.moe_forward.default, (*inputs, experts.handle))


def test_graph_replayed_with_changing_inputs() -> None:
    tokens = 4
    KTMoEWrapper.set_capture_batch_sizes([tokens])
    weights = Weights.random(1)
    wrapper = make_wrapper(weights=weights)
    static = on_device(batch(0, tokens))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            wrapper.submit_forward(*static, stream.cuda_stream)
            wrapper.sync_forward(static[0], stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        wrapper.submit_forward(*static, stream.cuda_stream)
        shared = wrapper.sync_forward(static[0], stream.cuda_stream)
        result = shared + 0
    # Captured buffers stay where they are whatever else happens.
    KTMoEWrapper.clear_buffer_cache()
    KExpertsCPUBuffer.get_buffer(torch.empty(9, 80, dtype=torch.bfloat16, device="cuda"), 2)
    for step in range(1000):
        inputs = batch(step, tokens)
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result.cpu(), wrapper.experts(*inputs)), step
        if step % 100 == 0:
            assert_wrapper_matches(result, weights.reference(form_of("int8")), *inputs)
    wrapper.cpu_infer.sync()


def test_graph_of_layers_with_deferred_experts() -> None:
    tokens = 3
    KTMoEWrapper.set_capture_batch_sizes([tokens])
    models = [Weights.random(seed) for seed in range(3)]
    layers = [
        make_wrapper(index, weights, max_deferred_experts_per_token=deferred)
        for index, (weights, deferred) in enumerate(zip(models, (1, 1, 0), strict=True))
    ]
    static = on_device(batch(0, tokens))
    stream = torch.cuda.Stream()

    def run() -> list[torch.Tensor]:
        return [layer.forward(*static, stream.cuda_stream) + 0 for layer in layers]

    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run()
    for step in range(200):
        inputs = batch(step, tokens)
        for target, source in zip(static, inputs, strict=True):
            target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        on_cpu = [layer.forward(*inputs).clone() for layer in layers]
        for result, expected in zip(results, on_cpu, strict=True):
            assert torch.equal(result.cpu(), expected), step


def test_layers_on_several_streams() -> None:
    weights = [Weights.random(1), Weights.random(2)]
    layers = [
        Experts.from_weights(*each.matrices(), num_experts_per_tok=2, format="int8", threads=2)
        for each in weights
    ]
    streams = [torch.cuda.Stream() for _ in layers]
    inputs = [[batch(10 * index + step, 6) for step in range(20)] for index in range(2)]
    device = [[on_device(each) for each in row] for row in inputs]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for step in range(20):
        for index, (layer, stream) in enumerate(zip(layers, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[index].append(layer(*device[index][step]))
    torch.cuda.synchronize()
    for index, layer in enumerate(layers):
        for step in range(20):
            assert torch.equal(results[index][step].cpu(), layer(*inputs[index][step])), (index, step)


def test_work_is_ordered_with_its_stream() -> None:
    wrapper = make_wrapper()
    stream = torch.cuda.Stream()
    inputs = batch(1, 4)
    expected = wrapper.experts(*inputs)
    x, ids, scores = on_device(inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        # Current and given stream differ from here on: the given one counts.
    wrapper.submit_forward(late, ids, scores, stream.cuda_stream)
    with torch.cuda.stream(stream):
        late.zero_()
    result = wrapper.sync_forward(late, stream)
    stream.synchronize()
    assert torch.equal(result.cpu(), expected)


def test_an_error_in_a_task() -> None:
    wrapper = make_wrapper()
    inputs = batch(1, 4)
    device = on_device(inputs)
    expected = wrapper.experts(*inputs)
    stream = torch.cuda.current_stream().cuda_stream

    submitted = threading.Event()

    def fail() -> None:
        assert submitted.wait(60)
        raise ZeroDivisionError("in a task")

    # The failure happens once the host is past the first forward.
    wrapper.cpu_infer.submit_with_cuda_stream(stream, fail)
    wrapper.forward(*device, stream)
    submitted.set()
    torch.cuda.synchronize()
    with pytest.raises(ZeroDivisionError, match="in a task"):
        wrapper.forward(*device, stream)
    result = wrapper.forward(*device, stream)
    torch.cuda.synchronize()
    assert torch.equal(result.cpu(), expected)


def test_a_replay_after_the_layer_is_closed() -> None:
    tokens = 4
    KTMoEWrapper.set_capture_batch_sizes([tokens])
    wrapper = make_wrapper()
    cpu_infer = wrapper.cpu_infer
    static = on_device(batch(0, tokens))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wrapper.forward(*static, stream.cuda_stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = wrapper.forward(*static, stream.cuda_stream) + 0
    graph.replay()
    torch.cuda.synchronize()
    cpu_infer.sync()
    assert not result.isnan().any()
    wrapper.close()
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(KtkError, match="closed"):
        cpu_infer.sync()


def test_a_mask_on_the_device() -> None:
    with pytest.raises(ValueError, match="gpu_experts_mask"):
        make_wrapper(gpu_experts_mask=torch.zeros(4, dtype=torch.bool, device="cuda"))
