"""Which part of a training step an operator belongs to, and how many FLOPs it does.

A product belongs to the layer whose weight it multiplies by, which `ledger.py` follows through casts and copies. What
is known by its name (attention, our ops, GELU) belongs where its name says; the rest belongs to the file that called
it. An operator of the backward belongs to the part of the operator whose gradient it computes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]

PRODUCTS = {  # part: what a weight's name contains; the first that fits
    "adaLN product": ("adaLN_modulation",),
    "qkv product": (".qkv.",),
    "proj product": (".attn.proj.",),
    "fc1 product": (".fc1.",),
    "fc2 product": (".fc2.",),
    "embedder products": ("x_embedder.", "t_embedder.", "y_embedder."),
    "head products": ("projector",),
    "output product": ("final_layer.linear.",),
}
FROZEN_PRODUCTS, NAMELESS_PRODUCTS = "frozen network's products", "products of unknown weights"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
NORMS, GELU, CASTS, BIAS_SUMS = "norms and gates", "GELU", "dtype casts", "bias-gradient sums"
STACKING, CONDITIONING, LOSS = "stacking dq, dk, dv", "conditioning and embeddings", "loss and head"
OPTIMIZER, DATA, FROZEN, OTHER = "optimizer and EMA", "data and draws", "frozen network's rest", "other"

PRODUCT_PARTS = (*PRODUCTS, FROZEN_PRODUCTS, NAMELESS_PRODUCTS)
ATTENTION_PARTS = (ATTENTION_FORWARD, ATTENTION_BACKWARD)
REST = (NORMS, GELU, CASTS, BIAS_SUMS, STACKING, CONDITIONING, LOSS, OPTIMIZER, DATA, FROZEN, OTHER)
PARTS = (*PRODUCT_PARTS, *ATTENTION_PARTS, *REST)

_BY_NAME = {"gelu": GELU, "layer_norm_modulate": NORMS, "alignment_velocity_loss": LOSS, "adamw_ema": OPTIMIZER}
_BY_FILE = {
    "sra2_fast/layers/attention.py": STACKING,
    "sra2_fast/layers/block.py": NORMS,
    "sra2_fast/layers/linear.py": OTHER,
    "sra2_fast/layers/conditioning.py": CONDITIONING,
    "sra2_fast/layers/modulation.py": CONDITIONING,
    "sra2_fast/layers/patch_embedding.py": CONDITIONING,
    "sra2_fast/models/sit.py": CONDITIONING,
    "sra2_fast/objective/terms.py": LOSS,
    "sra2_fast/objective/sra2_loss.py": DATA,
    "sra2_fast/train/diagnosis.py": LOSS,
    "sra2_fast/train/step.py": LOSS,
    "sra2_fast/optim/adamw_ema.py": OPTIMIZER,
    "sra2_fast/optim/shadow_weights.py": OPTIMIZER,
    "benchmarks/lib/public_optimizer.py": OPTIMIZER,
    "benchmarks/lib/dinov2.py": FROZEN,
}
_ATTENTION_TILE = 32  # FlashAttention 2 pads the head's size to a multiple of this


def product_of(weight: str) -> str:
    """The part of the products with this parameter of a SiT."""
    fits = (part for part, words in PRODUCTS.items() if any(word in weight for word in words))
    return next(fits, NAMELESS_PRODUCTS)


def part_by_name(name: str) -> str | None:
    """The part of an operator whose name says it: `aten::gelu_backward`, `sra2_fast::layer_norm_modulate_fwd`."""
    if is_attention(name):
        return ATTENTION_BACKWARD if is_backward(name) else ATTENTION_FORWARD
    if name in _EPILOGUE_FLOPS:
        return None  # a product: it belongs to its weight
    return next((part for word, part in _BY_NAME.items() if word in name), None)


def part_beside(part: str, name: str) -> str:
    """The part of an operator that is neither a product nor attention, but runs where one of `part` does.

    In a product's backward that is the sum over rows which the bias asks for.
    """
    if part in ATTENTION_PARTS:
        return STACKING
    if part in PRODUCT_PARTS:
        return BIAS_SUMS if name == "aten::sum" else OTHER
    return part


def part_by_caller(tensors: Sequence[Tensor]) -> str:
    """The part of the innermost calling function in a file that has one.

    In a block, what has no dimension of tokens is the conditioning.
    """
    part = next(filter(None, (_part_of_file(name) for name in _calling_files())), OTHER)
    return CONDITIONING if part == NORMS and all(t.dim() < 3 for t in tensors) else part


def product_by_caller() -> str:
    """The part of a product without a weight among its factors: the gradient of the adaLN weights, all at once."""
    is_adaln = any(name.endswith("sra2_fast/layers/modulation.py") for name in _calling_files())
    return "adaLN product" if is_adaln else NAMELESS_PRODUCTS


def _calling_files() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back  # type: ignore[assignment]


@functools.cache
def _part_of_file(filename: str) -> str | None:
    path = Path(filename)
    return _BY_FILE.get(path.relative_to(ROOT).as_posix()) if path.is_relative_to(ROOT) else None


def is_product(func: Any) -> bool:
    """Whether torch counts the operator's FLOPs (products, and attention), or it is a Linear's with an epilogue."""
    return func._overloadpacket in flop_registry or func._schema.name in _EPILOGUE_FLOPS


def product_of_epilogue(name: str, product: str | None) -> str | None:
    """The part of a product with an epilogue. An MLP is one node of autograd, noted as its first product's; where it
    asks for a weight's gradient with the bias's, that is the second's."""
    return "fc2 product" if name == "sra2_fast::linear_weight_bwd" and product == "fc1 product" else product


def epilogue_bytes(name: str, args: Sequence[Any], out: Any) -> int:
    """Bytes that an epilogue moves beside its product: GELU's input, written forward and read backward."""
    beside = {"sra2_fast::linear_gelu_fwd": lambda: out[1], "sra2_fast::linear_gelu_bwd": lambda: args[2]}
    return tensor_bytes(beside[name]()) if name in beside else 0


def is_attention(name: str) -> bool:
    """Whether the operator is softmax(q k^T) v in one, or its backward."""
    return "scaled_dot_product" in name or "attention_matmul" in name or name.startswith("flash_attn")


def is_backward(name: str) -> bool:
    return name.endswith(("_backward", "_bwd"))


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> tuple[int, int]:
    """(counted, executed) FLOPs of an operator; zeros for what is no product.

    Counted is what everybody counts (counting.py): a backward does twice its forward's. Executed is what an attention
    kernel really does: its backward computes q k^T again, and heads are padded to a multiple of 32.
    """
    name = func._schema.name
    if is_attention(name):
        q, k = args[1:3] if is_backward(name) else args[:2]
        if "attention_matmul" in name:  # of the packed projection
            q = k = (args[1] if is_backward(name) else args[0])[:, :, 0]
        head_dim = q.shape[-1]
        keys = k.shape[2] if "scaled_dot_product" in name else k.shape[1]
        forward = 4 * q.numel() * keys
        padded = forward // head_dim * (-(-head_dim // _ATTENTION_TILE) * _ATTENTION_TILE)
        return (2 * forward, 5 * padded // 2) if is_backward(name) else (forward, padded)
    formula = _OUR_FLOPS.get(name)
    if formula is not None:
        count = formula(*args)
    elif is_product(func):
        count = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
    else:
        count = 0
    return count, count


def _projection_forward(hidden: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * hidden.numel() * weight.shape[0]


def _projection_backward(
    dalign: Tensor, dp: Tensor, hidden: Tensor, weight: Tensor, need_dhidden: bool, need_dweight: bool, *_: Any
) -> int:
    width = weight.shape[-1] if need_dhidden else hidden.shape[-1]
    return 2 * dp.numel() * width * (need_dhidden + need_dweight)


def _product_flops(first: Tensor, second: Tensor, *_: Any) -> int:
    """Of two factors, of which the first, (M, K), and the second share a dimension: GELU's, and its derivative's."""
    rows, shared = first.shape
    return 2 * rows * second.numel() if shared in second.shape else 0


def _weight_gradient_flops(dy: Tensor, x: Tensor) -> int:
    return 2 * dy.numel() * x.shape[1]


_EPILOGUE_FLOPS: dict[str, Callable[..., int]] = {
    "sra2_fast::linear_gelu_fwd": _product_flops,
    "sra2_fast::linear_gelu_bwd": _product_flops,
    "sra2_fast::linear_weight_bwd": _weight_gradient_flops,
}
_OUR_FLOPS: dict[str, Callable[..., int]] = {
    **_EPILOGUE_FLOPS,
    "sra2_fast::alignment_velocity_loss_fwd": _projection_forward,
    "sra2_fast::alignment_velocity_loss_bwd": _projection_backward,
}


def bytes_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that the operator's arguments and results are: read once, written once, in-place arguments both.

    Repeated elements of an expanded tensor count once. What a kernel reads twice, or keeps in between, does not count:
    this is the floor of its traffic.
    """
    schema = func._schema
    is_overwriting = schema.name.split("::")[-1] in _OVERWRITING
    is_gradient_of_attention = is_attention(schema.name) and is_backward(schema.name)
    total = 0
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_overwritten = (is_overwriting and index == 0) or (schema.name, argument.name) in _OVERWRITTEN
        is_overwritten |= is_gradient_of_attention and argument.name in ("dq", "dk", "dv")
        write_only = is_written and (argument.is_out or is_overwritten)
        total += sum(map(tensor_bytes, tensors_in(value))) * (2 if is_written and not write_only else 1)
    results = out if isinstance(out, tuple | list) else (out,)
    for result, returned in zip(results, schema.returns, strict=False):  # an operator of no result returns None
        if returned.alias_info is None:
            total += sum(map(tensor_bytes, tensors_in(result)))
    return total


_OVERWRITING = ("copy_", "_foreach_copy_", "zero_", "fill_")
_OVERWRITTEN = (("sra2_fast::adamw_ema_step", "shadows"),)


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements."""
    sizes = [size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return functools.reduce(int.__mul__, sizes, 1) * tensor.element_size()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an argument or result: one, a list of them, or none."""
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, tuple | list) else []


def costs_nothing(func: Any) -> bool:
    """Views, empty tensors and questions: no kernel runs."""
    namespace, name = func._schema.name.split("::")
    return namespace == "profiler" or func.is_view or "empty" in name or name in _FREE


_FREE = ("_unsafe_view", "_reshape_alias", "lift_fresh", "_local_scalar_dense")


def is_cast(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the operator only changes its argument's dtype, or that of a list of them."""
    if func is torch.ops.aten._foreach_copy_.default:
        return args[0][0].dtype != args[1][0].dtype
    return func is torch.ops.aten._to_copy.default and kwargs.get("dtype") not in (None, args[0].dtype)
