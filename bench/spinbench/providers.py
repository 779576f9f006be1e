"""Ours and the peers: each builder turns a job into a call without arguments, float32 in and float32 out.

Every builder gets the same weights and the same contiguous float32 input; layout and dtype conversions are timed.
bfloat16 PyTorch peers convert the model: under autocast eager was a tenth faster on the small network and a tenth
slower on the large one, behind torch.compile and OpenVINO in both. Only workers import this: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from spinbench.networks import Case
from spinbench.plain import Plain


@dataclass(frozen=True)
class Job:
    case: Case
    plain: Plain
    x: torch.Tensor
    threads: int
    folder: Path  # for temporary files

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.case.dtype)


def captured(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`call` as one CUDA graph, replayed on the tensors that it was captured with."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their kernels, allocators find their sizes
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def spin(job: Job, frozen: bool) -> Callable:
    from spinbench.ours import make_ours

    model = make_ours(job.case.network, job.plain).to(job.x.device, job.dtype)
    if frozen:
        model.freeze()
        if job.case.network.patch and job.x.device.type == "cpu":
            return lambda: model(job.x)  # a packed network takes the float32 image as it is
    # The Triton kernels read tokens x channels, which a stem in this layout makes.
    layout = torch.channels_last if job.x.is_cuda else torch.preserve_format
    return lambda: model(job.x.to(dtype=job.dtype, memory_format=layout)).float().contiguous()


def eager(job: Job, memory_format: torch.memory_format) -> Callable:
    model = job.plain.to(job.x.device, job.dtype).to(memory_format=memory_format)
    return lambda: model(job.x.to(dtype=job.dtype, memory_format=memory_format)).float().contiguous()


def compiled(job: Job, memory_format: torch.memory_format, mode: str = "default") -> Callable:
    torch._inductor.config.freezing = True  # constant weights, the strongest setting for inference
    model = job.plain.to(job.x.device, job.dtype).to(memory_format=memory_format)
    call = torch.compile(model, dynamic=False, mode=mode)
    return lambda: call(job.x.to(dtype=job.dtype, memory_format=memory_format)).float().contiguous()


def openvino(job: Job) -> Callable:
    import openvino as ov

    model = ov.convert_model(job.plain, example_input=job.x, input=[tuple(job.x.shape)])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",  # one stream; the default settings choose the same
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job.case.dtype],
        "INFERENCE_NUM_THREADS": job.threads,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    image = job.x.numpy()
    return lambda: request.infer([image], share_inputs=True, share_outputs=True)[0]


def onnxruntime(job: Job) -> Callable:
    import onnxruntime as ort

    path = job.folder / "model.onnx"
    torch.onnx.export(job.plain, (job.x,), path, dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.x.numpy()}
    return lambda: session.run(None, feed)[0]


BUILDERS: dict[str, Callable[[Job], Callable]] = {
    "spin frozen": partial(spin, frozen=True),
    "spin": partial(spin, frozen=False),
    "spin graphs": lambda job: captured(spin(job, frozen=True)),
    "eager": partial(eager, memory_format=torch.contiguous_format),
    "eager channels_last": partial(eager, memory_format=torch.channels_last),
    "compile": partial(compiled, memory_format=torch.contiguous_format),
    "compile channels_last": partial(compiled, memory_format=torch.channels_last),
    "autotune": partial(compiled, memory_format=torch.contiguous_format, mode="max-autotune"),
    "autotune channels_last": partial(compiled, memory_format=torch.channels_last, mode="max-autotune"),
    "graphs": lambda job: captured(eager(job, torch.contiguous_format)),
    "graphs channels_last": lambda job: captured(eager(job, torch.channels_last)),
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}
