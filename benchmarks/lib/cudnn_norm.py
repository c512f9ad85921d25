"""cuDNN's adaLayerNorm as a benchmark variant: y = LN(x) scale + bias, a scale and bias a sample.

Through the graphs of the package nvidia-cudnn-frontend (docs.nvidia.com/deeplearning/cudnn, "Normalizations"), one
built for each shape and type and then kept. It takes float32 scales, so 1 + scale is formed and cast in PyTorch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sra2_fast.ops.checks import once_differentiable


@functools.cache
def _handle() -> Any:
    return importlib.import_module("cudnn").create_handle()


def _new_graph(cudnn: Any) -> Any:
    return cudnn.pygraph(
        intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT, handle=_handle()
    )


def _type_of(cudnn: Any, dtype: torch.dtype) -> Any:
    return cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.FLOAT


def _tensor(cudnn: Any, graph: Any, name: str, dim: list[int], dtype: torch.dtype, **options: Any) -> Any:
    stride = [dim[1] * dim[2], dim[2], 1]
    return graph.tensor(name=name, dim=dim, stride=stride, data_type=_type_of(cudnn, dtype), **options)


def _built(cudnn: Any, graph: Any) -> Any:
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph


def forward_graph(cudnn: Any, shape: tuple[int, int, int], x_dtype: torch.dtype, y_dtype: torch.dtype) -> Any:
    """(graph, its tensors by name), not yet built."""
    B, N, D = shape
    graph = _new_graph(cudnn)
    rows = {name: _tensor(cudnn, graph, name, [B, 1, D], torch.float32) for name in ("scale", "bias")}
    x = _tensor(cudnn, graph, "x", [B, N, D], x_dtype)
    epsilon = _tensor(cudnn, graph, "epsilon", [1, 1, 1], torch.float32, is_pass_by_value=True)
    phase = cudnn.norm_forward_phase.TRAINING
    y, mean, rstd = graph.adalayernorm(norm_forward_phase=phase, input=x, epsilon=epsilon, name="adaln", **rows)
    y.set_output(True).set_data_type(_type_of(cudnn, y_dtype))
    for statistic in (mean, rstd):
        statistic.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    return graph, {"x": x, **rows, "epsilon": epsilon, "y": y, "mean": mean, "rstd": rstd}


def backward_graph(cudnn: Any, shape: tuple[int, int, int], x_dtype: torch.dtype, dy_dtype: torch.dtype) -> Any:
    """(graph, its tensors by name), not yet built."""
    B, N, D = shape
    graph = _new_graph(cudnn)
    given = {
        "grad": _tensor(cudnn, graph, "grad", [B, N, D], dy_dtype),
        "input": _tensor(cudnn, graph, "input", [B, N, D], x_dtype),
        "scale": _tensor(cudnn, graph, "scale", [B, 1, D], torch.float32),
        "mean": _tensor(cudnn, graph, "mean", [B, N, 1], torch.float32),
        "inv_variance": _tensor(cudnn, graph, "inv_variance", [B, N, 1], torch.float32),
    }
    dx, dscale, dbias = graph.adalayernorm_backward(name="dadaln", **given)
    dx.set_output(True).set_data_type(_type_of(cudnn, x_dtype))
    for gradient in (dscale, dbias):
        gradient.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    return graph, {**given, "dx": dx, "dscale": dscale, "dbias": dbias}


@functools.cache
def _plan(kind: str, *of: Any) -> tuple[Any, Mapping[str, Any], Tensor]:
    """(graph, tensors, workspace) of "forward" or "backward", built once a shape and type."""
    cudnn = importlib.import_module("cudnn")
    graph, tensors = (forward_graph if kind == "forward" else backward_graph)(cudnn, *of)
    workspace = torch.empty(max(1, _built(cudnn, graph).get_workspace_size()), dtype=torch.uint8, device="cuda")
    return graph, tensors, workspace


def _run(kind: str, of: tuple[Any, ...], values: Mapping[str, Tensor]) -> None:
    graph, tensors, workspace = _plan(kind, *of)
    cudnn = importlib.import_module("cudnn")
    cudnn.set_stream(handle=_handle(), stream=torch.cuda.current_stream().cuda_stream)
    graph.execute({tensors[name]: value for name, value in values.items()}, workspace, handle=_handle())


class _AdaLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, bias, eps, y_dtype):
        B, N, D = x.shape
        y, mean = torch.empty_like(x, dtype=y_dtype), x.new_empty(B, N, 1, dtype=torch.float32)
        rstd, epsilon = torch.empty_like(mean), torch.full((1, 1, 1), eps)
        values = {"x": x, "scale": scale, "bias": bias, "epsilon": epsilon, "y": y, "mean": mean, "rstd": rstd}
        _run("forward", ((B, N, D), x.dtype, y_dtype), values)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, scale, mean, rstd = ctx.saved_tensors
        dx, dscale = torch.empty_like(x), torch.empty_like(scale)
        dbias = torch.empty_like(scale)
        values = {"grad": dy.contiguous(), "input": x, "scale": scale, "mean": mean, "inv_variance": rstd}
        values |= {"dx": dx, "dscale": dscale, "dbias": dbias}
        _run("backward", (tuple(x.shape), x.dtype, dy.dtype), values)
        return dx, dscale, dbias, None, None


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """The op of this name through cuDNN; y in the autocast dtype where autocast is on."""
    is_bf16 = torch.is_autocast_enabled("cuda") or x.dtype == torch.bfloat16
    gain, bias = (1 + scale.float())[:, None].contiguous(), shift.float()[:, None].contiguous()
    return _AdaLayerNorm.apply(x, gain, bias, eps, torch.bfloat16 if is_bf16 else x.dtype)
