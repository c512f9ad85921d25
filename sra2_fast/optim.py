"""AdamW with global-norm clipping and an exponential moving average of the weights, as one optimizer.

It exists because the three are otherwise three trips through memory and dozens of launches a step. It is an ordinary
`torch.optim.Optimizer`: parameter groups, schedulers and hooks work, and its state loads into and from
`torch.optim.AdamW`. Left out: amsgrad, maximize, sparse gradients, float16 (there is no GradScaler in bf16 training),
what FSDP2 shards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, must_be, must_have_type
from .ops import adamw_ema as op

IMPLEMENTATIONS = ("fused", "eager", "apex")
TORCH_ONLY = ("foreach", "capturable", "differentiable", "fused")  # how torch runs AdamW, not what it computes


@dataclass
class _Active:
    """The tensors of one group's parameters that have a gradient, kept from step to step while that set is the same.

    Each parameter's state["step"] is a view of its entry of `tensors.steps`; the gradients are left out.
    states: {key: tensor} of each parameter, as the optimizer's state held it when this was gathered.
    """

    key: tuple[object, ...]
    tensors: op.AdamWEMATensors
    states: list[dict[str, Tensor]]

    def is_of(self, key: tuple[object, ...], state: Mapping[Tensor, dict[str, Tensor]]) -> bool:
        """Whether the parameters are the same, and nobody cleared their state or replaced a tensor of it."""
        if self.key != key:
            return False
        for param, own in zip(self.tensors.params, self.states, strict=True):
            now = state.get(param, {})
            if any(now.get(name) is not value for name, value in own.items()):
                return False
        return True


class AdamWEMA(torch.optim.Optimizer):
    """Clip, AdamW, EMA: `reference/adamw_ema.py` has the equations; the defaults are the paper's (arXiv 2601.17830).

    params: parameters, (name, parameter) pairs, or groups of either; float32 (`implementation="eager"` also takes
        bfloat16 and float64), all on one device.
    lr, betas, eps, weight_decay: as in torch.optim.AdamW; floats. Per group; may change between steps.
    ema_decay: weight of the old average, in [0, 1], or None for no averaging. Per group; may change between steps.
        A CUDA graph of a step replays with the numbers it was captured with.
    max_grad_norm: clip the norm over the gradients of all groups to this, or None.
    implementation: "fused" (the kernels; None means this), "eager" (PyTorch's own operators) or "apex" (the kernel of
        NVIDIA apex's FusedAdam, CUDA only; clip and average are PyTorch's).

    `.grad_norm` is the 0-d norm of the last step before clipping, `.skipped_steps` the 0-d int64 count of steps whose
    norm was not finite: both on the device, so that reading them late is the caller's choice. Such a step changes
    nothing at all. The average starts as a copy of the weights at the first step, or when it is first asked for.
    "eager" clips `p.grad` in place, "fused" leaves it as it was. Everything is accumulated in the type of the
    parameters, and is deterministic.

    Raises InputError, InputTypeError: a setting out of range, parameters of another type or on several devices, apex
        asked for where it does not import.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = 0.9999,
        max_grad_norm: float | None = 1.0,
        *,
        implementation: str | None = None,
    ) -> None:
        if implementation not in (None, *IMPLEMENTATIONS):
            raise must_be("AdamWEMA", "implementation", f"one of {', '.join(IMPLEMENTATIONS)}", repr(implementation))
        if implementation == "apex" and (why := op.why_not_apex()) is not None:
            raise InputError(f'AdamWEMA: implementation="apex" needs NVIDIA apex with its CUDA kernels: {why}')
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise must_be("AdamWEMA", "max_grad_norm", "a number above 0, or None", max_grad_norm)
        self.implementation = implementation or "fused"
        self.max_grad_norm = max_grad_norm
        self._active: dict[int, _Active] = {}
        self._is_swapped = False
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "ema_decay": ema_decay}
        super().__init__(params, defaults)
        device = next(p.device for group in self.param_groups for p in group["params"])
        self.grad_norm = torch.zeros((), device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the group is checked, and not added if it is wrong."""
        super().add_param_group(param_group)
        try:
            _check_settings(self.param_groups[-1])
            device = next((p.device for group in self.param_groups for p in group["params"]), None)
            for name, param in self._named(self.param_groups[-1]):
                self._check_param(name, param, device)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_param(self, name: str, param: Tensor, device: torch.device | None) -> None:
        if hasattr(param, "to_local"):
            expected = "a plain tensor (what FSDP2 shards is for torch.optim.AdamW)"
            raise must_have_type("AdamWEMA", f"parameter {name}", expected, type(param).__name__)
        is_eager = self.implementation == "eager"
        if param.dtype not in ((torch.float32, torch.bfloat16, torch.float64) if is_eager else (torch.float32,)):
            expected = "float32, bfloat16 or float64"
            if not is_eager:
                expected = 'float32 (implementation="eager" also takes bfloat16 and float64)'
            raise must_have_type("AdamWEMA", f"parameter {name}", expected, param.dtype)
        if self.implementation == "apex" and param.device.type != "cuda":
            raise must_be("AdamWEMA", f"parameter {name}", 'on cuda for implementation="apex"', param.device)
        if param.device != device:
            raise must_be("AdamWEMA", f"parameter {name}", f"on {device} as the first one", param.device)
        if torch.empty_like(param, device="meta").stride() != param.stride():
            raise must_be("AdamWEMA", f"parameter {name}", "dense in memory", f"strides {param.stride()}")

    def _named(self, group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The group's parameters with their names, or their index over all groups where none were given."""
        if "param_names" in group:
            yield from zip(group["param_names"], group["params"], strict=True)
            return
        start = 0
        for other in self.param_groups:
            if other is group:
                break
            start += len(other["params"])
        for index, param in enumerate(group["params"], start):
            yield str(index), param

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient, and every average; no host synchronisation.

        A parameter without a gradient keeps its value and moments; its average still moves towards it.
        Raises InputError: inside `swap_ema`, or for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_swapped:
            raise InputError("AdamWEMA: step() must be called outside swap_ema, got a call inside")
        self._refuse_sparse()
        active = [self._gather(index, group) for index, group in enumerate(self.param_groups)]
        with_grad = [p for a in active for p in a.tensors.params]
        if not with_grad:
            return loss
        norm, is_finite = self._norm(with_grad)
        if not any(group["lr"] for group in self.param_groups):
            # torch.distributed.checkpoint makes the state of a fresh optimizer by a step of rate 0 on zero gradients.
            is_finite &= norm > 0
            norm = torch.where(is_finite, norm, math.inf)
        for group, a in zip(self.param_groups, active, strict=True):
            if a.tensors.params:
                self._update(group, a.tensors, norm, is_finite)
            self._average_the_rest(group, is_finite)
        return loss

    def _norm(self, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The global norm and whether it is finite, both 0-d and noted for the user; eager also clips here."""
        if self._is_fused(params[0]):
            norm = op.global_norm([_dense_grad(p) for p in params])
        else:
            is_eager = self.implementation != "apex"  # apex's kernel clips
            norm = op.eager_norm_and_clip(params, self.max_grad_norm if is_eager else None)
        is_finite = torch.isfinite(norm)
        self.grad_norm = norm
        self.skipped_steps = self.skipped_steps.to(norm.device, non_blocking=True)
        self.skipped_steps += ~is_finite
        return norm, is_finite

    def _is_fused(self, param: Tensor) -> bool:
        return self.implementation == "fused" and op.is_fused(param.device)

    def _update(self, group: dict[str, Any], tensors: op.AdamWEMATensors, norm: Tensor, is_finite: Tensor) -> None:
        tensors = replace(tensors, grads=[_dense_grad(p) for p in tensors.params])  # a copy: kept, they would live on
        beta1, beta2 = group["betas"]
        named = {name: group[name] for name in ("lr", "eps", "weight_decay", "ema_decay")}
        settings = op.AdamWEMASettings(beta1=beta1, beta2=beta2, max_grad_norm=self.max_grad_norm, **named)
        if self._is_fused(tensors.params[0]):
            tensors.steps += is_finite
            op.adamw_ema_step(tensors, norm, settings)
        elif self.implementation == "apex":
            tensors.steps += is_finite
            op.apex(tensors, norm, is_finite, settings)
        else:
            op.eager(tensors, is_finite, settings)

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            if all(p.grad is None or p.grad.layout is torch.strided for p in group["params"]):
                continue
            name = next(n for n, p in self._named(group) if p.grad is not None and p.grad.layout is not torch.strided)
            raise must_be("AdamWEMA", f"the gradient of {name}", "dense (embeddings: sparse=False)", "a sparse one")

    def _gather(self, index: int, group: dict[str, Any]) -> _Active:
        """The group's tensors for this step; state is made for a parameter that is updated for the first time."""
        params = [p for p in group["params"] if p.grad is not None]
        if not isinstance(group["lr"], float | int):
            raise must_be("AdamWEMA", "lr", "a float", type(group["lr"]).__name__)
        has_ema = group["ema_decay"] is not None
        key = (has_ema, *map(id, params))
        kept = self._active.get(index)
        if kept is not None and kept.is_of(key, self.state):
            return kept
        states = [self._state_of(p, has_ema) for p in params]
        steps = torch.zeros(len(params), device=params[0].device if params else None)
        for i, state in enumerate(states):
            steps[i] = state["step"]
            state["step"] = steps[i]
        self._active[index] = _Active(
            key=key,
            tensors=op.AdamWEMATensors(
                params=params,
                grads=[],
                exp_avgs=[s["exp_avg"] for s in states],
                exp_avg_sqs=[s["exp_avg_sq"] for s in states],
                emas=[s["ema"] for s in states] if has_ema else None,
                steps=steps,
            ),
            states=[dict(state) for state in states],
        )
        return self._active[index]

    def _state_of(self, param: Tensor, has_ema: bool) -> dict[str, Tensor]:
        """The state of one parameter, complete: what is missing is made, and all lies in memory as it does."""
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _laid_out_as(param, state[name]) if name in state else torch.zeros_like(param)
        if has_ema:
            state["ema"] = _laid_out_as(param, state["ema"]) if "ema" in state else param.detach().clone()
        state["step"] = torch.as_tensor(state.get("step", 0), dtype=torch.float32, device=param.device)
        return state

    def _average_the_rest(self, group: dict[str, Any], is_finite: Tensor) -> None:
        """Move the averages of parameters that have one but no gradient in this step."""
        if group["ema_decay"] is None:
            return
        idle = [p for p in group["params"] if p.grad is None and "ema" in self.state.get(p, ())]
        op.eager_ema([self.state[p]["ema"] for p in idle], idle, group["ema_decay"], is_finite)

    def ema_state_dict(self) -> dict[str, Tensor]:
        """{name: averaged weight} of every parameter, by index over all groups where no names were given.

        The tensors are the live averages (no copies): later steps move them. A frozen parameter that was never updated
        stands for itself.
        Raises InputError: inside `swap_ema`, or where no group has an ema_decay.
        """
        self._must_average("ema_state_dict")
        return {name: self._average_of(group, p) for group in self.param_groups for name, p in self._named(group)}

    def _average_of(self, group: dict[str, Any], param: Tensor) -> Tensor:
        has_ema = group["ema_decay"] is not None
        if has_ema and param.requires_grad and "ema" not in self.state[param]:
            self._active.clear()
            self._state_of(param, has_ema)
        return self.state[param]["ema"] if "ema" in self.state.get(param, ()) else param.detach()

    def _must_average(self, what: str) -> None:
        if self._is_swapped:
            raise InputError(f"AdamWEMA: {what} must be called outside swap_ema, got a call inside")
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise must_be("AdamWEMA", "ema_decay", f"a float for {what}", None)

    @contextmanager
    def swap_ema(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the block `model` holds the averaged weights; afterwards its own again, whatever happened inside.

        Values are exchanged in place, one tensor at a time: addresses stay (compiled code and CUDA graphs go on
        working) and no second copy of the model is made.
        Raises InputError: model has none of the optimizer's parameters, no averages are kept, or a swap is on already.
        """
        self._must_average("swap_ema")
        of_model = set(map(id, model.parameters()))
        owned = [(group, p) for group in self.param_groups for p in group["params"]]
        if not any(id(p) in of_model for _, p in owned):
            raise must_be("AdamWEMA", "model", "the module whose parameters are optimized", type(model).__name__)
        pairs = [(p, self._average_of(group, p)) for group, p in owned if id(p) in of_model]
        pairs = [(p, ema) for p, ema in pairs if ema.data_ptr() != p.data_ptr()]
        _exchange(pairs)
        self._is_swapped = True
        try:
            yield
        finally:
            self._is_swapped = False
            _exchange(pairs)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW's ("step" is 0-d on the CPU there), with the average under "ema" for each parameter."""
        if self._is_swapped:
            raise InputError("AdamWEMA: state_dict must be called outside swap_ema, got a call inside")
        packed = super().state_dict()
        packed["state"] = {
            index: {**state, "step": state["step"].detach().cpu().clone()} if "step" in state else state
            for index, state in packed["state"].items()
        }
        return packed

    def load_ema_state_dict(self, averages: Mapping[str, Tensor]) -> None:
        """Take the averages from {name: tensor}, as `ema_state_dict` or a public checkpoint's "ema" has them.

        Names of frozen parameters may be missing. Raises InputError: inside `swap_ema`, where no group has an
        ema_decay, for a missing or unknown name, or another shape.
        """
        self._must_average("load_ema_state_dict")
        own = {name: (group, p) for group in self.param_groups for name, p in self._named(group)}
        unknown = next((name for name in averages if name not in own), None)
        if unknown is not None:
            names = f"by the parameters' names (AdamWEMA(model.named_parameters())), such as {next(iter(own))}"
            raise must_be("AdamWEMA", "averages", names, unknown)
        for name in [*averages, *(name for name, (_, p) in own.items() if p.requires_grad)]:
            want = tuple(own[name][1].shape)
            got = tuple(averages[name].shape) if name in averages else "none"
            if want != got:
                raise must_be("AdamWEMA", f"the average of {name}", want, got)
        with torch.no_grad():
            for name, average in averages.items():
                group, param = own[name]
                if param.requires_grad and group["ema_decay"] is not None:
                    self._average_of(group, param).copy_(average)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW.

        Without averages in it a warning says so, and they start at the weights: `load_ema_state_dict` brings them.
        Raises InputError: the state is of amsgrad, of maximize, or of Adam without decoupled weight decay.
        """
        groups = []
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            for option in ("amsgrad", "maximize"):
                if saved.get(option):
                    raise must_be("AdamWEMA", f"{option} of the loaded state", "False", True)
            if not saved.get("decoupled_weight_decay", True):
                raise must_be("AdamWEMA", "the loaded state", "of AdamW", "Adam's (decoupled_weight_decay False)")
            unknown = (*TORCH_ONLY, "amsgrad", "maximize", "decoupled_weight_decay")
            kept = {name: value for name, value in saved.items() if name not in unknown}
            groups.append({"ema_decay": own["ema_decay"], **kept})
        groups += state_dict["param_groups"][len(groups) :]
        self._active.clear()
        super().load_state_dict({**state_dict, "param_groups": groups})
        is_averaging = any(group["ema_decay"] is not None for group in self.param_groups)
        if is_averaging and self.state and not any("ema" in state for state in self.state.values()):
            warnings.warn(
                "AdamWEMA: the loaded state has no averages; they start at the weights as they are now, "
                "or give the saved ones to load_ema_state_dict",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        own = ("implementation", "max_grad_norm", "grad_norm", "skipped_steps", "_is_swapped")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}, "_active": {}}


def _check_settings(group: dict[str, Any]) -> None:
    lr, betas, decay = group["lr"], group["betas"], group["ema_decay"]
    if not isinstance(lr, float | int) or not 0 <= lr < math.inf:
        raise must_be("AdamWEMA", "lr", "a finite float, 0 or more", lr)
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise must_be("AdamWEMA", "betas", "two numbers in [0, 1)", betas)
    for name in ("eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise must_be("AdamWEMA", name, "a finite number, 0 or more", group[name])
    if decay is not None and not 0 <= decay <= 1:
        raise must_be("AdamWEMA", "ema_decay", "in [0, 1], or None", decay)


def _laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """`value`, or a copy with the strides of `param` where it has others: kernels see flat memory."""
    return value if value.stride() == param.stride() else torch.empty_like(param).copy_(value)


def _dense_grad(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    if grad.stride() == param.stride() and grad.dtype == param.dtype:
        return grad
    return torch.empty_like(param).copy_(grad)


def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for a, b in pairs:
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)
