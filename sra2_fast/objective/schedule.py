"""How the alignment weight changes with the step: alignment helps early and can hold a model back late."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError, must_be

SCHEDULES = ("constant", "linear", "stop")


@dataclass(frozen=True)
class Schedule:
    """A factor on the alignment weight.

    kind: "constant": 1; "linear": from 1 at step `start` down to 0 at `steps`; "stop": 1 before `steps`, then 0.
    """

    kind: str = "constant"
    steps: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise must_be("SRA2Loss", "schedule", " or ".join(SCHEDULES), repr(self.kind))
        if self.kind != "constant" and (self.steps is None or self.steps < 1):
            raise must_be("SRA2Loss", "schedule_steps", f"a positive step for schedule={self.kind!r}", self.steps)

    def factor(self, step: int | None) -> float:
        """The factor at this step (from 0)."""
        if self.kind == "constant":
            return 1.0
        if step is None:
            raise InputError(f"SRA2Loss: schedule={self.kind!r} needs step= at every call")
        assert self.steps is not None
        if self.kind == "linear":
            return min(1.0, max(0.0, 1 - (step - self.start) / (self.steps - self.start)))
        return 1.0 if step < self.steps else 0.0
