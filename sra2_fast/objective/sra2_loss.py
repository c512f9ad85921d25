"""SRA2Loss: L = L_velocity + lambda L_align for SRA 2, and for the targets it is compared with (REPA, SRA).

The randomness of a batch (time, noise, dropped labels) is drawn here unless it is passed in; the computation happens
inside the model's forward, through `Terms`. Nothing here looks at a tensor's value on the host.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn

from ..errors import InputError, must_be, must_have_type
from ..ops.alignment_velocity_loss import ALIGNMENTS
from ..ops.interpolant import PATHS, interpolant
from .schedule import Schedule
from .terms import LossOutput, Terms
from .time import TIMES, time_from_uniform

TARGETS = ("vae", "features", "teacher")
DEFAULT_WEIGHT = {"cosine": 0.5, "smooth_l1": 1.0, "mse": 1.0, "l1": 1.0}
XL_DEPTH, XL_TEACHER_DEPTH = 28, 20  # SRA's blocks at XL; elsewhere the teacher reads twice as deep as the student


class SRA2Loss:
    """loss = mean (v - v*)^2 + lambda L_align(MLP(h_l), target) (arXiv 2601.17830).

    path: "linear" or "cosine". time: "uniform" or "lognormal" distribution of t.
    align: "cosine" (negative, per token), "smooth_l1" (the paper's, with beta), "mse", "l1"; None: velocity alone.
    align_weight: lambda; None is 0.5 for cosine, 1 for the others.
    target: "vae" - the clean latent (SRA 2); "features" - tokens of a frozen encoder passed at each call (REPA, arXiv
        2410.06940); "teacher" - the EMA copy's tokens at a smaller time (SRA, arXiv 2505.02831).
    schedule, schedule_steps: "constant", "linear" decay to 0, or "stop" at a step; the last two need `step=` at a call.
    teacher_depth: the teacher's block; None is 20 for a 28-block model, else twice the student's (at most the depth).
    teacher_gap: the teacher's time is clamp(t - u, 0, 1) with u uniform in [0, teacher_gap].
    Raises InputError for an unknown word or a value out of range.
    """

    def __init__(
        self,
        path: str = "linear",
        time: str = "uniform",
        align: str | None = "cosine",
        align_weight: float | None = None,
        beta: float = 0.05,
        *,
        target: str = "vae",
        schedule: str = "constant",
        schedule_steps: int | None = None,
        teacher_depth: int | None = None,
        teacher_gap: float = 0.2,
    ) -> None:
        for name, value, words in (
            ("path", path, PATHS),
            ("time", time, TIMES),
            ("align", align, (*ALIGNMENTS, None)),
            ("target", target, TARGETS),
        ):
            if value not in words:
                raise must_be("SRA2Loss", name, " or ".join(map(str, words)), repr(value))
        if not 0 < beta < math.inf:
            raise must_be("SRA2Loss", "beta", "positive", beta)
        if align_weight is not None and not 0 <= align_weight < math.inf:
            raise must_be("SRA2Loss", "align_weight", "zero or positive", align_weight)
        if teacher_depth is not None and teacher_depth < 1:
            raise must_be("SRA2Loss", "teacher_depth", "None or a block from 1", teacher_depth)
        if not 0 <= teacher_gap <= 1:
            raise must_be("SRA2Loss", "teacher_gap", "in [0, 1]", teacher_gap)
        self.path = path
        self.time = time
        self.align = align
        self.align_weight = DEFAULT_WEIGHT.get(align or "", 0.0) if align_weight is None else align_weight
        self.beta = beta
        self.target = target
        self.schedule = Schedule(schedule, schedule_steps)
        self.teacher_depth = teacher_depth
        self.teacher_gap = teacher_gap

    def time_from_uniform(self, u: torch.Tensor) -> torch.Tensor:
        """(B,) uniform draws in (0, 1) -> (B,) times of this loss's distribution."""
        return time_from_uniform(u, self.time, self.path)

    def __call__(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        labels: torch.Tensor,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        label_drop: torch.Tensor | None = None,
        teacher_gap: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        teacher: nn.Module | None = None,
        step: int | None = None,
    ) -> LossOutput:
        """The loss of one batch.

        model: a `SiT`, bare or wrapped by DDP, FSDP2 or torch.compile.
        latents: (B, C, H, W) float32 (bfloat16 is taken to it) - clean latents z. labels: (B,) int64.
        t: (B,) - time; noise: like latents; label_drop: (B,) bool - labels replaced by the null label; teacher_gap:
            (B,) - u above. None draws each from torch's generator (labels are dropped only while the model trains).
        features: (B, N, F) - for target="features". teacher: the EMA copy - for target="teacher".
        step: the training step, for a schedule.
        Returns LossOutput(total, velocity, align); total alone carries gradients.
        Raises InputError naming the argument that is missing, superfluous or of the wrong shape.
        """
        self._check(latents, labels, t, noise, label_drop, teacher_gap, features, teacher)
        sit = _unwrapped(model)
        if latents.dtype == torch.bfloat16:
            latents, noise = latents.float(), None if noise is None else noise.float()
        if self.align is not None and sit.align_depth is None:
            raise InputError("SRA2Loss: there is no projector; build the model with align_depth=, or give align=None")
        if t is None:
            t = self.time_from_uniform(torch.rand(latents.shape[0], device=latents.device))
        if noise is None:
            noise = torch.randn_like(latents)
        # Dropped here, not in the model, because the teacher must see the same labels.
        if label_drop is None and sit.training and sit.class_dropout_prob > 0:
            label_drop = torch.rand(labels.shape, device=labels.device) < sit.class_dropout_prob
        if label_drop is not None:
            labels = torch.where(label_drop, sit.num_classes, labels)
        weight = self._weight(step, latents.device)
        target_tokens = features
        if self.target == "teacher" and self.align is not None:
            assert teacher is not None
            target_tokens = self._teacher_tokens(teacher, sit, latents, labels, t, noise, teacher_gap)
        terms = Terms(latents, noise, t, self.path, self.align, weight, self.beta, target_tokens)
        keep_labels = torch.zeros_like(labels, dtype=torch.bool)
        x_t = interpolant(self.path, t).mix(latents, noise)
        return model(x_t, t, labels, force_drop_ids=keep_labels, loss_inputs=terms)

    def _weight(self, step: int | None, device: torch.device) -> float | torch.Tensor:
        factor = self.schedule.factor(step)
        if self.schedule.kind == "constant":
            return self.align_weight
        # A tensor, because a compiled model would be compiled again for every new float.
        return torch.full((), self.align_weight * factor, device=device)

    def _teacher_tokens(
        self,
        teacher: nn.Module,
        sit: Any,
        latents: torch.Tensor,
        labels: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        gap: torch.Tensor | None,
    ) -> torch.Tensor:
        depth = self.teacher_depth
        if depth is None:
            depth = XL_TEACHER_DEPTH if sit.depth == XL_DEPTH else min(2 * sit.align_depth, sit.depth)
        if gap is None:
            gap = self.teacher_gap * torch.rand_like(t)
        earlier = (t - gap).clamp(0, 1)
        with torch.no_grad():
            x_t = interpolant(self.path, earlier).mix(latents, noise)
            keep_labels = torch.zeros_like(labels, dtype=torch.bool)
            return teacher(x_t, earlier, labels, force_drop_ids=keep_labels, return_hidden=depth)

    def _check(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor,
        t: torch.Tensor | None,
        noise: torch.Tensor | None,
        label_drop: torch.Tensor | None,
        teacher_gap: torch.Tensor | None,
        features: torch.Tensor | None,
        teacher: nn.Module | None,
    ) -> None:
        if latents.dim() != 4:
            raise must_be("SRA2Loss", "latents", "(B, C, H, W)", tuple(latents.shape))
        if not latents.is_floating_point() or latents.dtype == torch.float16:
            raise must_have_type("SRA2Loss", "latents", "float32 or bfloat16", latents.dtype)
        batch = latents.shape[:1]
        for name, value, shape in (
            ("labels", labels, batch),
            ("t", t, batch),
            ("noise", noise, latents.shape),
            ("label_drop", label_drop, batch),
            ("teacher_gap", teacher_gap, batch),
        ):
            if value is not None and value.shape != shape:
                raise must_be("SRA2Loss", name, tuple(shape), tuple(value.shape))
        if self.align is None:
            return
        for name, given in (("features", features is not None), ("teacher", teacher is not None)):
            if self.target == name and not given:
                raise InputError(f"SRA2Loss: target={name!r} needs {name}= at every call")
            if self.target != name and given:
                raise InputError(f"SRA2Loss: {name}= is only for target={name!r}, this loss has {self.target!r}")


def _unwrapped(model: Any) -> Any:
    """The SiT inside DDP (`module`) and torch.compile (`_orig_mod`)."""
    inner = model
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    if not _takes_loss_inputs(type(inner)):
        name = f"{type(inner).__module__}.{type(inner).__qualname__}"
        raise must_have_type("SRA2Loss", "model", "a sra2_fast.SiT, bare or wrapped", name)
    return inner


def _takes_loss_inputs(kind: type) -> bool:
    """Of our SiT and what derives from it, but for the compat models, whose forward is that of their repository."""
    forward = getattr(kind, "forward", None)
    return callable(forward) and "loss_inputs" in inspect.signature(forward).parameters
