"""Aligner: SRA 2 for any transformer, as a hook on one of its layers and a projector beside it.

`SiT` and `SRA2Loss` are the fast way for SiT; this is the way for a model, a loop and a parametrisation that are not
ours. The model is not changed: what is trained besides lies in the aligner, and `remove` takes the hook off again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import recipe
from ..errors import InputError, must_be, must_have_type
from ..layers.projector import build_projector, readable_last
from ..models import LossOutput
from ..objective.schedule import Schedule
from ..ops.alignment_velocity_loss import ALIGNMENTS, MAX_PATCH_ELEMENTS, alignment_loss
from ..ops.alignment_velocity_loss import alignment_velocity_loss as _fused
from ..ops.patchify import patchify
from .tap import Tap, find_layer, hidden_size_of

IMPLEMENTATIONS = ("fused", "eager")


class Aligner(nn.Module):
    """L = mean (prediction - target)^2 + lambda L_align(MLP(h_layer), z) (arXiv 2601.17830), on a model of any kind.

        aligner = Aligner(model, "transformer_blocks.7", latent_channels=4, patch_size=2, grid=(16, 16))
        optimizer.add_param_group(aligner.parameter_group())
        loss = aligner(latents, prediction, target).total    # after prediction = model(...)

    model: the transformer, bare or wrapped by DDP, torch.compile or peft; attach before it is compiled.
    layer: the name of the module whose output is aligned, as in `model.named_modules()`. SRA 2 takes an early block:
        the second of 12, the eighth of 28.
    latent_channels: C of the latents. patch_size: of the model, a number or one a dimension, such as (1, 2, 2).
    grid: tokens a dimension, (H, W) or (F, H, W); the model's tokens count in this order, columns fastest.
    align, weight, beta: as SRA2Loss's align, align_weight and beta.
    decay: (first, last): the weight falls linearly to 0 from step `first` to step `last`; then pass `step=`.
    latent_mean, latent_std: (C,) - the target is (z - mean) / std, for autoencoders whose channels are neither centred
        nor of one size; None: z as it is. The prediction's loss never changes by them.
    select: which tokens: None for the layer's output, or the one tensor of N tokens in a tuple (the image's tokens of a
        joint block); an index into the tuple; or a function of the output that returns (B, N, D).
    hidden_size: D; None asks the model. projector_layers, projector_dim: as SiT's.
    implementation: "fused" (one kernel for projection and both losses) or "eager".

    As a module it has `parameters()`, `state_dict()` and `to()`; the model's own are untouched. DDP: wrap the model and
    the aligner, each, and call the wrapped aligner. FSDP2: shard the model, and wrap the aligner in DDP. Copies of the
    model (averages of its weights) are not aligned.
    Raises InputError for a layer that is not there and for values out of range.
    """

    latent_mean: Tensor | None
    latent_std: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        *,
        latent_channels: int,
        patch_size: int | Sequence[int],
        grid: Sequence[int],
        align: str = "cosine",
        weight: float | None = None,
        beta: float = recipe.BETA,
        decay: tuple[int, int] | None = None,
        latent_mean: Tensor | Sequence[float] | None = None,
        latent_std: Tensor | Sequence[float] | None = None,
        select: int | Callable[[Any], Tensor] | None = None,
        hidden_size: int | None = None,
        projector_layers: int = 5,
        projector_dim: int | None = None,
        implementation: str = "fused",
    ) -> None:
        super().__init__()
        self.layer, self.grid = layer, tuple(grid)
        self.patch_size = (patch_size,) * len(self.grid) if isinstance(patch_size, int) else tuple(patch_size)
        self.latent_channels, self.select, self.implementation = latent_channels, select, implementation
        self.align, self.beta = align, beta
        self.weight = recipe.ALIGN_WEIGHT.get(align, 1.0) if weight is None else weight
        self.num_tokens = math.prod(self.grid)
        self.token_size = math.prod(self.patch_size) * latent_channels
        self._check(projector_layers, decay)
        self.schedule = Schedule() if decay is None else Schedule("linear", decay[1], start=decay[0])
        module = find_layer(model, layer)
        self.hidden_size = hidden_size or hidden_size_of(model) or 0
        if not self.hidden_size:
            raise InputError(f"Aligner: {type(model).__name__} does not say how wide its tokens are; give hidden_size=")
        dim = projector_dim or 2 * self.hidden_size
        self.projector = build_projector(self.hidden_size, dim, self.token_size, projector_layers)
        for name, values in (("latent_mean", latent_mean), ("latent_std", latent_std)):
            self.register_buffer(name, None if values is None else self._of_channels(name, values))
        first = next(iter(model.parameters()), None)
        if first is not None:
            self.to(first.device)
        # The model by a weak reference: it must not become a part of this module, nor live on because of it.
        self._model, self._module = weakref.ref(model), weakref.ref(module)
        self._tap = Tap(is_live=True)
        self._handle = module.register_forward_hook(self._tap)
        self._is_attached = True

    def parameter_group(self, *, named: bool = False, **settings: Any) -> dict[str, Any]:
        """The projector as a parameter group, for `optimizer.add_param_group`; settings such as lr=, weight_decay=.

        named: with names (aligner.projector.0.weight), for an optimizer that was given named parameters.
        """
        return {"params": list(self.named_parameters("aligner") if named else self.parameters()), **settings}

    def weight_at(self, step: int | None = None) -> float:
        """lambda at this step (from 0); 0 says that the aligner may be removed."""
        return self.weight * self.schedule.factor(step)

    def remove(self) -> None:
        """Take the hook off the model, which is then as it was before; the projector stays here."""
        self._handle.remove()
        self._tap.output, self._is_attached = None, False

    def forward(
        self,
        latents: Tensor,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
        *,
        step: int | None = None,
    ) -> LossOutput:
        """The loss of the model's last call, which is used up by it.

        latents: (B, C, *sizes) with sizes = grid * patch_size, or as tokens (B, N, P) - clean latents z.
        prediction: likewise - the model's output, without channels for a variance; target: what it is compared with,
            whatever the parametrisation (noise - latents, noise, v). None for both: the alignment alone, for a loop
            that has a loss of its own.
        step: the training step, for decay=.
        Returns LossOutput(total, velocity, align): total = velocity + weight * align carries the gradient; velocity is
            mean (prediction - target)^2, or 0.
        Raises InputError for other shapes, where the layer has not run, or where its output carries no gradient.
        Precision: compared in float32. The fused op takes target + z and z, so a target is rounded once more.
        """
        hidden = self._hidden(len(latents))
        if (prediction is None) != (target is None):
            given, missing = ("target", "prediction") if prediction is None else ("prediction", "target")
            raise InputError(f"Aligner: {given} needs {missing}; leave out both for the alignment alone")
        z = self._tokens("latents", self._normalised(latents.detach()))
        projector = cast(nn.Sequential, self.projector)
        last = readable_last(projector) if prediction is not None and self.implementation == "fused" else None
        if prediction is None or target is None:
            align = alignment_loss(projector(hidden), z, self.align, self.beta)
            velocity = torch.zeros_like(align)
        else:
            p, v = self._tokens("prediction", prediction), self._tokens("target", target.detach())
            if last is None:
                velocity = F.mse_loss(p, v)
                align = alignment_loss(projector(hidden), z, self.align, self.beta)
            else:
                # The op makes its own target, noise - latents on the linear path; both as images of 1 x N patches of 1.
                image, noise = z.mT.unsqueeze(2), (v + z).mT.unsqueeze(2)
                settings: dict[str, Any] = {"patch_size": 1, "path": "linear", "align": self.align, "beta": self.beta}
                t = z.new_zeros(len(z))
                velocity, align = _fused(projector[:-1](hidden), last.weight, last.bias, p, image, noise, t, **settings)
        total = velocity + self.weight_at(step) * align
        return LossOutput(total, velocity.detach(), align.detach())

    def _hidden(self, batch: int) -> Tensor:
        """The layer's tokens (B, N, D) of the model's last call, in the projector's type."""
        if not self._is_attached:
            raise InputError("Aligner: it was removed from the model; make another one to align again")
        model = self._model()
        if model is not None and find_layer(model, self.layer) is not self._module():
            raise InputError(
                f"Aligner: {self.layer} was replaced (by peft?) after it was attached; attach to the finished model"
            )
        output = self._tap.take()
        if output is None:
            raise InputError(
                f"Aligner: {self.layer} has not run since the last loss; call the model before each one, "
                "and attach before torch.compile has compiled it"
            )
        tokens = self._select(output)
        expected = (batch, self.num_tokens, self.hidden_size)
        if tokens.shape != expected:
            raise must_be("Aligner", f"the output of {self.layer}", f"(B, N, D) = {expected}", tuple(tokens.shape))
        if torch.is_grad_enabled() and not tokens.requires_grad:
            raise InputError(
                f"Aligner: the output of {self.layer} carries no gradient; train something up to it, and checkpoint "
                "activations with use_reentrant=False"
            )
        first = next(self.projector.parameters())
        if tokens.device != first.device:
            raise InputError(
                f"Aligner: it is on {first.device}, the model on {tokens.device}; move it: aligner.to(...)"
            )
        return tokens.to(first.dtype)

    def _select(self, output: Any) -> Tensor:
        if callable(self.select):
            found = self.select(output)
        elif isinstance(output, Tensor) or self.select is not None:
            found = output if isinstance(output, Tensor) else output[self.select]
        else:
            parts = list(output) if isinstance(output, tuple | list) else []
            fitting = [one for one in parts if isinstance(one, Tensor) and one.shape[1:2] == (self.num_tokens,)]
            if len(fitting) != 1:
                got = [tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in parts]
                expected = f"one tensor of {self.num_tokens} tokens, or give select="
                raise must_be("Aligner", f"the output of {self.layer}", expected, got or type(output).__name__)
            (found,) = fitting
        if not isinstance(found, Tensor):
            raise must_have_type(
                "Aligner", f"the output of {self.layer}", "a tensor (see select=)", type(found).__name__
            )
        return found

    def _normalised(self, latents: Tensor) -> Tensor:
        if self.latent_mean is None and self.latent_std is None:
            return latents
        if latents.dim() == 3:
            raise must_be("Aligner", "latents", "(B, C, ...), not tokens, with latent_mean or latent_std", "tokens")
        shape = (-1, *[1] * (latents.dim() - 2))
        z = latents.float()
        z = z if self.latent_mean is None else z - self.latent_mean.view(shape)
        return z if self.latent_std is None else z / self.latent_std.view(shape)

    def _tokens(self, name: str, x: Tensor) -> Tensor:
        """(B, N, P) in float32; in the eager implementation float64 stays."""
        sizes = tuple(g * p for g, p in zip(self.grid, self.patch_size, strict=True))
        if x.shape[1:] == (self.latent_channels, *sizes):
            x = patchify(x, self.patch_size)
        elif x.shape[1:] != (self.num_tokens, self.token_size):
            expected = f"(B, C, ...) = (B, {', '.join(map(str, (self.latent_channels, *sizes)))})"
            raise must_be("Aligner", name, expected, tuple(x.shape))
        if not x.is_floating_point():
            raise must_have_type("Aligner", name, "a float", x.dtype)
        return x if x.dtype == torch.float64 and self.implementation == "eager" else x.float()

    def _of_channels(self, name: str, values: Tensor | Sequence[float]) -> Tensor:
        numbers = torch.as_tensor(values, dtype=torch.float32).detach().clone()
        if numbers.shape != (self.latent_channels,):
            raise must_be("Aligner", name, f"(C,) = ({self.latent_channels},)", tuple(numbers.shape))
        if not torch.isfinite(numbers).all() or (name == "latent_std" and not (numbers > 0).all()):
            raise must_be("Aligner", name, "finite, a std above 0", numbers.tolist())
        return numbers

    def _check(self, projector_layers: int, decay: tuple[int, int] | None) -> None:
        size, limit = self.token_size, MAX_PATCH_ELEMENTS
        is_decay = decay is None or (len(decay) == 2 and 0 <= decay[0] < decay[1])
        for name, is_right, expected, got in (
            ("grid", len(self.grid) in (2, 3) and min(self.grid) >= 1, "(H, W) or (F, H, W) in tokens", self.grid),
            ("patch_size", len(self.patch_size) == len(self.grid), "a number, or one a dimension", self.patch_size),
            ("patch_size", min(self.patch_size, default=0) >= 1, "at least 1", self.patch_size),
            ("latent_channels", self.latent_channels >= 1, "at least 1", self.latent_channels),
            ("align", self.align in ALIGNMENTS, " or ".join(ALIGNMENTS), repr(self.align)),
            ("weight", 0 <= self.weight < math.inf, "zero or positive", self.weight),
            ("beta", 0 < self.beta < math.inf, "positive", self.beta),
            ("decay", is_decay, "(first, last) with 0 <= first < last", decay),
            ("projector_layers", projector_layers >= 1, "at least 1", projector_layers),
            ("implementation", self.implementation in IMPLEMENTATIONS, "fused or eager", repr(self.implementation)),
            (
                "implementation",
                size <= limit or self.implementation == "eager",
                f'"eager" for patches of more than {limit} elements',
                f"{self.implementation!r} with {size}",
            ),
        ):
            if not is_right:
                raise must_be("Aligner", name, expected, got)
