"""Linear layers that can leave GELU and the sums for their biases to the product's epilogue (ops/linear.py).

Whether they do is an attribute, set from outside (models/products.py): nothing is looked up in a traced forward.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import linear as _op
from .plain import is_plain, is_readable, watched


class Linear(nn.Linear):
    """nn.Linear with a bias, whose gradient is summed beside the weight's where `has_epilogue` is set."""

    has_epilogue = False

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., K) -> (.., N)."""
        if self.has_epilogue and _op.takes(x, self.weight):
            return _op.linear(x, self.weight, self.bias)
        return super().forward(x)


class Mlp(nn.Module):
    """D -> mlp_ratio D -> D with tanh-GELU, in the products' epilogues where `has_epilogue` is set.

    Not where somebody listens to one of its layers or has put something in its place: then they are called.
    """

    has_epilogue = False

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = watched(nn.Linear(hidden_size, mlp_hidden_size))
        self.act = watched(nn.GELU(approximate="tanh"))
        self.fc2 = watched(nn.Linear(mlp_hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: (.., D) -> (.., D)."""
        if self.has_epilogue and self._is_readable() and _op.takes(x, self.fc1.weight, self.fc2.weight):
            return _op.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(self.fc1(x)))

    def _is_readable(self) -> bool:
        return is_readable(self.fc1, nn.Linear) and is_readable(self.fc2, nn.Linear) and is_plain(self.act, nn.GELU)
