"""The papers' recipes and our defaults: the aligned block, the teacher's, the heads, and what changes with the step.

The trainer, the objective, the benchmarks and `configs/` read them from here. SRA 2: arXiv 2601.17830; REPA: arXiv
2410.06940; SRA: arXiv 2505.02831. Pure functions of numbers and names: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LR = 1e-4
BATCH_SIZE = 256
EMA_DECAY = 0.9999
MAX_GRAD_NORM = 1.0
LABEL_DROPOUT = 0.1
BETA = 0.05  # of smooth-L1
ALIGN_WEIGHT = {"cosine": 0.5, "smooth_l1": 1.0, "mse": 1.0, "l1": 1.0}
TEACHER_GAP = 0.2  # the teacher's time is at most so much smaller

XL_DEPTH, XL_TEACHER_DEPTH = 28, 20
_ALIGN_DEPTH = {
    "vae": {"S": 2, "B": 2, "L": 8, "XL": 8},
    "features": {"S": 4, "B": 4, "L": 8, "XL": 8},
    "teacher": {"S": 4, "B": 4, "L": 4, "XL": 8},
}


def align_depth(model: str, depth: int, target: str) -> int:
    """The aligned block of a registry name such as SiT-B/2, or of another model a quarter of its depth.

    target: "vae" (SRA 2), "features" (REPA) or "teacher" (SRA).
    """
    size = model.removeprefix("SiT-").split("/")[0]
    return _ALIGN_DEPTH[target].get(size, max(1, depth // 4))


def teacher_depth(depth: int, align_depth: int) -> int:
    """The teacher's block: SRA's 20 at XL, elsewhere twice the student's, at most the last."""
    return XL_TEACHER_DEPTH if depth == XL_DEPTH else min(2 * align_depth, depth)


def projector(target: str, hidden_size: int, feature_dim: int | None = None) -> dict[str, Any]:
    """Arguments of SiT's projector: SRA 2's five layers to the latent's patch, REPA's three to the encoder's width,
    SRA's two to the model's own."""
    if target == "features":
        return {"projector_layers": 3, "projector_dim": 2048, "projection_dim": feature_dim}
    if target == "teacher":
        return {"projector_layers": 2, "projector_dim": 2 * hidden_size, "projection_dim": hidden_size}
    return {"projector_layers": 5}


@dataclass(frozen=True)
class UpdateSchedule:
    """What changes from update to update: learning rate and the weight of the old average.

    lr_warmup: steps over which the rate rises linearly; ema_decay: of old averages, None for no average.
    """

    lr: float = LR
    lr_warmup: int = 0
    ema_decay: float | None = EMA_DECAY

    def at(self, step: int) -> dict[str, Any]:
        """Settings of an optimizer's parameter groups for the update that makes step `step` (from 1) complete.

        The decay is min(ema_decay, (1 + step) / (10 + step)): young averages forget the initial weights quickly.
        """
        rise = min(1.0, step / self.lr_warmup) if self.lr_warmup else 1.0
        decay = None if self.ema_decay is None else min(self.ema_decay, (1 + step) / (10 + step))
        return {"lr": self.lr * rise, "ema_decay": decay}
