"""SRA2Loss: L = L_velocity + lambda L_align for SRA 2, and for the targets it is compared with (REPA, SRA).

The randomness of a batch (time, noise, dropped labels) is drawn here unless it is passed in; the computation happens
inside the model's forward, through `Terms`. Nothing here looks at a tensor's value on the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import recipe
from ..errors import InputError, must_be, must_have_type
from ..models import LossOutput, SiT
from ..ops.alignment_velocity_loss import ALIGNMENTS
from ..ops.interpolant import PATHS, interpolant
from .draws import Draws
from .schedule import Schedule
from .terms import Terms
from .time import TIMES, time_from_uniform

TARGETS = ("vae", "features", "teacher")
REDUCTIONS = ("mean", "none")


class SRA2Loss:
    """loss = mean (v - v*)^2 + lambda L_align(MLP(h_l), target) (arXiv 2601.17830).

    path: "linear", or "cosine" - the cosine path, which SiT calls "gvp" (taken too); no relation to the alignment.
    time: "uniform" or "lognormal" distribution of t.
    align: "cosine" (negative cosine similarity, per token), "smooth_l1" (the paper's, with beta), "mse", "l1"; None:
        velocity alone.
    align_weight: lambda; None is 0.5 for cosine, 1 for the others.
    target: "vae" - the clean latent (SRA 2); "features" - tokens of a frozen encoder passed at each call (REPA, arXiv
        2410.06940); "teacher" - the EMA copy's tokens at a smaller time (SRA, arXiv 2505.02831).
    schedule, schedule_steps: "constant", "linear" decay to 0, or "stop" at a step; the last two need `step=` at a call.
    teacher_depth: the teacher's block; None is 20 for a 28-block model, else twice the student's (at most the depth).
    teacher_gap: the teacher's time is clamp(t - u, 0, 1) with u uniform in [0, teacher_gap].
    align_tokens: the share of each image's tokens, drawn anew for each call, that are projected and compared: an
        unbiased alignment for that share of the head's products. Below 1 by PyTorch's own operators.
    reduction: "mean", or "none" for the losses of each sample, (B,), to weight them: their means are the losses of
        "mean". They come from PyTorch's own operators, not from the fused loss.
    Raises InputError for an unknown word or a value out of range.
    """

    def __init__(
        self,
        path: str = "linear",
        time: str = "uniform",
        align: str | None = "cosine",
        align_weight: float | None = None,
        beta: float = recipe.BETA,
        *,
        target: str = "vae",
        schedule: str = "constant",
        schedule_steps: int | None = None,
        teacher_depth: int | None = None,
        teacher_gap: float = recipe.TEACHER_GAP,
        align_tokens: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        self.path = "cosine" if path == "gvp" else path
        self.time, self.align, self.target = time, align, target
        self.align_weight = recipe.ALIGN_WEIGHT.get(align or "", 0.0) if align_weight is None else align_weight
        self.beta = beta
        self.schedule = Schedule(schedule, schedule_steps)
        self.teacher_depth, self.teacher_gap, self.reduction = teacher_depth, teacher_gap, reduction
        self.align_tokens = align_tokens
        for name, words in (
            ("path", PATHS),
            ("time", TIMES),
            ("align", (*ALIGNMENTS, None)),
            ("target", TARGETS),
            ("reduction", REDUCTIONS),
        ):
            if getattr(self, name) not in words:
                raise must_be("SRA2Loss", name, " or ".join(map(str, words)), repr(getattr(self, name)))
        for name, is_right, expected in (
            ("beta", 0 < beta < math.inf, "positive"),
            ("align_weight", 0 <= self.align_weight < math.inf, "zero or positive"),
            ("teacher_depth", teacher_depth is None or teacher_depth >= 1, "None or a block from 1"),
            ("teacher_gap", 0 <= teacher_gap <= 1, "in [0, 1]"),
            ("align_tokens", 0 < align_tokens <= 1, "in (0, 1]"),
        ):
            if not is_right:
                raise must_be("SRA2Loss", name, expected, getattr(self, name))

    @property
    def has_teacher(self) -> bool:
        """Whether a call needs `teacher=`."""
        return self.target == "teacher" and self.align is not None

    def time_from_uniform(self, u: Tensor) -> Tensor:
        """(B,) uniform draws in (0, 1) -> (B,) times of this loss's distribution."""
        return time_from_uniform(u, self.time, self.path)

    def draws(
        self,
        latents: Tensor,
        class_dropout_prob: float,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        label_drop: Tensor | None = None,
        teacher_gap: Tensor | None = None,
        time_uniform: Tensor | None = None,
        label_uniform: Tensor | None = None,
        teacher_uniform: Tensor | None = None,
        token_uniform: Tensor | None = None,
    ) -> Draws:
        """What is random in a batch of latents (B, C, H, W), for `__call__`.

        class_dropout_prob: chance of dropping a label; 0 where none is dropped, as in evaluation.
        t, noise, label_drop, teacher_gap: kept where they are given.
        time_uniform, label_uniform, teacher_uniform: (B,) in (0, 1) that the others are made of, as the data loader
            has them; None draws from torch's generator. token_uniform: likewise, for align_tokens below 1.
        """
        batch, device = latents.shape[0], latents.device
        if t is None:
            t = self.time_from_uniform(torch.rand(batch, device=device) if time_uniform is None else time_uniform)
        if noise is None:
            noise = torch.randn_like(latents)
        if label_drop is None and class_dropout_prob > 0:
            uniform = torch.rand(batch, device=device) if label_uniform is None else label_uniform
            label_drop = uniform < class_dropout_prob
        if teacher_gap is None and self.has_teacher:
            teacher_gap = self.teacher_gap * (torch.rand_like(t) if teacher_uniform is None else teacher_uniform)
        if self.align is None or self.align_tokens == 1:
            token_uniform = None
        elif token_uniform is None:
            token_uniform = torch.rand(batch, device=device)
        return Draws(t, noise, label_drop, teacher_gap, token_uniform)

    def __call__(
        self,
        model: nn.Module,
        latents: Tensor,
        labels: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        label_drop: Tensor | None = None,
        teacher_gap: Tensor | None = None,
        token_uniform: Tensor | None = None,
        features: Tensor | None = None,
        teacher: nn.Module | None = None,
        step: int | None = None,
        align_weight: Tensor | None = None,
    ) -> LossOutput:
        """The loss of one batch.

        model: a `SiT`, bare or wrapped by DDP, FSDP, torch.compile or peft; its input is taken to its own dtype.
        latents: (B, C, H, W) float32 (bfloat16 is taken to it) - clean latents z. labels: (B,) int64.
        t: (B,) - time; noise: like latents; label_drop: (B,) bool - labels replaced by the null label; teacher_gap:
            (B,) - u above; token_uniform: (B,) in (0, 1) - which tokens. `draws` fills what is None (labels are dropped
            only while the model trains).
        features: (B, N, F) - for target="features". teacher: the EMA copy - for target="teacher".
        step: the training step, for a schedule. align_weight: 0-d float32, lambda in place of the schedule's: what a
            captured step reads.
        Returns LossOutput(total, velocity, align), 0-d or with reduction="none" (B,); total alone carries gradients.
        Raises InputError naming the argument that is missing, superfluous or of the wrong shape.
        """
        given = {"t": t, "noise": noise, "label_drop": label_drop, "teacher_gap": teacher_gap}
        given["token_uniform"] = token_uniform
        self._check(latents, {"labels": labels, **given}, {"features": features, "teacher": teacher})
        sit = unwrapped(model)
        if latents.dtype == torch.float64 != next(sit.parameters()).dtype:
            raise must_have_type("SRA2Loss", "latents", "float32 or bfloat16 for this model", latents.dtype)
        if latents.dtype == torch.bfloat16:
            latents, given["noise"] = latents.float(), None if noise is None else noise.float()
        if self.align is not None and sit.align_depth is None:
            raise InputError("SRA2Loss: there is no projector; build the model with align_depth=, or give align=None")
        draws = self.draws(latents, sit.class_dropout_prob if sit.training else 0.0, **given)
        # Dropped here, not in the model, because the teacher must see the same labels.
        if draws.label_drop is not None:
            labels = torch.where(draws.label_drop, sit.num_classes, labels)
        keep_labels = torch.zeros_like(labels, dtype=torch.bool)
        weight = self._weight(step, latents.device) if align_weight is None else align_weight
        target_tokens = features
        if self.has_teacher and draws.teacher_gap is not None and teacher is not None:
            earlier = (draws.t - draws.teacher_gap).clamp(0, 1)
            with torch.no_grad():
                x_t = interpolant(self.path, earlier).mix(latents, draws.noise)
                block = self._teacher_block(sit)
                x_t = _like_weights(x_t, teacher)
                target_tokens = teacher(x_t, earlier, labels, force_drop_ids=keep_labels, return_hidden=block)
        terms = Terms(
            latents,
            draws.noise,
            draws.t,
            self.path,
            self.align,
            weight,
            self.beta,
            target_tokens,
            self.reduction,
            draws.token_uniform,
            self.align_tokens,
        )
        x_t = interpolant(self.path, draws.t).mix(latents, draws.noise)
        return model(_like_weights(x_t, model), draws.t, labels, force_drop_ids=keep_labels, loss_inputs=terms)

    def weight_at(self, step: int | None) -> float:
        """lambda at this step (from 0)."""
        return self.align_weight * self.schedule.factor(step)

    def _weight(self, step: int | None, device: torch.device) -> float | Tensor:
        weight = self.weight_at(step)
        # A tensor, because a compiled model would be compiled again for every new float.
        return weight if self.schedule.kind == "constant" else torch.full((), weight, device=device)

    def _teacher_block(self, sit: SiT) -> int:
        if self.teacher_depth is not None:
            return self.teacher_depth
        assert sit.align_depth is not None
        return recipe.teacher_depth(sit.depth, sit.align_depth)

    def _check(self, latents: Tensor, tensors: dict[str, Tensor | None], targets: dict[str, Any]) -> None:
        if latents.dim() != 4:
            raise must_be("SRA2Loss", "latents", "(B, C, H, W)", tuple(latents.shape))
        if not latents.is_floating_point() or latents.dtype == torch.float16:
            raise must_have_type("SRA2Loss", "latents", "float32 or bfloat16", latents.dtype)
        labels = tensors["labels"]
        if labels is not None and labels.dtype not in (torch.int64, torch.int32):
            raise must_have_type("SRA2Loss", "labels", "int64", labels.dtype)  # the null label is no int8
        for name, value in tensors.items():
            shape = latents.shape if name == "noise" else latents.shape[:1]
            if value is not None and value.shape != shape:
                raise must_be("SRA2Loss", name, tuple(shape), tuple(value.shape))
        for name, target in targets.items() if self.align is not None else ():
            if self.target == name and target is None:
                raise InputError(f"SRA2Loss: target={name!r} needs {name}= at every call")
            if self.target != name and target is not None:
                raise InputError(f"SRA2Loss: {name}= is only for target={name!r}, this loss has {self.target!r}")


def unwrapped(model: nn.Module) -> SiT:
    """The SiT inside DDP (`module`), torch.compile (`_orig_mod`) and peft (`base_model`, then `model`)."""
    inner = model
    while not isinstance(inner, SiT):
        named = [getattr(inner, name, None) for name in ("module", "_orig_mod", "base_model", "model")]
        wrapped = [one for one in named if isinstance(one, nn.Module) and one is not inner]
        if not wrapped:
            name = f"{type(inner).__module__}.{type(inner).__qualname__}"
            raise must_have_type("SRA2Loss", "model", "a sra2_fast.SiT, bare or wrapped", name)
        inner = wrapped[0]
    return inner


def _like_weights(x: Tensor, module: nn.Module) -> Tensor:
    """x in the type of the module's first parameter, as a bf16 model or teacher needs it."""
    weight = next(module.parameters(), x)
    return x.to(weight.dtype) if weight.is_floating_point() else x
