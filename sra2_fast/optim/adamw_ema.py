"""AdamW with global-norm clipping and an exponential moving average of the weights, as one optimizer.

It exists because the three are otherwise three trips through memory and dozens of launches a step. It is an ordinary
`torch.optim.Optimizer`: parameter groups, schedulers and hooks work, and its state loads into and from
`torch.optim.AdamW`. Left out: amsgrad, maximize, sparse gradients, float16 (there is no GradScaler in bf16 training),
what FSDP2 shards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, must_be
from ..ops import adamw_ema as op
from .checks import check_dense_gradients, check_param, check_rates, check_settings
from .gathered import Active, dense_grad, exchange, laid_out_as
from .shadow_weights import ShadowWeights

IMPLEMENTATIONS = ("fused", "eager", "apex")
TORCH_ONLY = ("foreach", "capturable", "differentiable", "fused")  # how torch runs AdamW, not what it computes


class AdamWEMA(torch.optim.Optimizer):
    """Clip, AdamW, EMA: `reference/adamw_ema.py` has the equations; the defaults are the paper's (arXiv 2601.17830).

    params: parameters, (name, parameter) pairs, or groups of either; float32 (`implementation="eager"` also takes
        bfloat16 and float64), all on one device.
    lr, betas, eps, weight_decay: as in torch.optim.AdamW; floats. Per group; may change between steps.
    ema_decay: weight of the old average, in [0, 1], or None for no averaging. Per group; may change between steps.
        lr and ema_decay may also be 0-d tensors on the device (float64 keeps 1 - ema_decay exact): a CUDA graph of a
        step replays with what they hold then, and with the numbers it was captured with for all else.
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
        self._active: dict[tuple[int, bool], Active] = {}
        self._shadows: ShadowWeights | None = None
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
            check_settings(self.param_groups[-1])
            device = next((p.device for group in self.param_groups for p in group["params"]), None)
            for name, param in self._named(self.param_groups[-1]):
                check_param(name, param, device, self.implementation)
        except Exception:
            self.param_groups.pop()
            raise

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
        for group in self.param_groups:
            check_dense_gradients(group, self._named)
        active = [self._gather(index, group) for index, group in enumerate(self.param_groups)]
        leaves = [leaf for pair in active for a in pair for leaf in a.tensors.shadows or a.tensors.params]
        if not leaves:
            return loss
        norm, is_finite = self._norm(leaves)
        if not any(isinstance(group["lr"], Tensor) or group["lr"] for group in self.param_groups):
            # torch.distributed.checkpoint makes the state of a fresh optimizer by a step of rate 0 on zero gradients.
            is_finite &= norm > 0
            norm = torch.where(is_finite, norm, math.inf)
        for group, pair in zip(self.param_groups, active, strict=True):
            for a in pair:
                if a.tensors.params:
                    self._update(group, a.tensors, norm, is_finite)
            self._average_the_rest(group, is_finite)
        return loss

    @contextmanager
    def bf16_weights(self, network: torch.nn.Module, keep: Iterable[Tensor] = ()) -> Iterator[ShadowWeights]:
        """Within the block `network`'s Linears hold bf16 copies of their weights, made by the last `step`.

            with opt.bf16_weights(model), torch.autocast("cuda", torch.bfloat16):
                loss_fn(model, latents, labels).total.backward()
            opt.step()

        The same numbers as autocast alone, without casting a weight or a weight's gradient (shadow_weights.py). One
        backward a step, in one process; gradients are not in `p.grad` but in `grad_of(p)`.
        keep: parameters that stay float32.
        Raises InputError: the implementation is not the fused one, or has no kernel on the device; a second backward.
        """
        if not self.can_shadow:
            raise InputError("AdamWEMA: bf16_weights needs the fused kernels (sra2-fast info); use autocast alone")
        if self._shadows is None or self._shadows.network is not network:
            params = [p for group in self.param_groups for p in group["params"]]
            self._shadows = ShadowWeights(network, params, keep)
        with self._shadows.in_place():
            yield self._shadows

    @property
    def can_shadow(self) -> bool:
        """Whether `bf16_weights` works: the kernels write shadows."""
        return self._is_fused(self.param_groups[0]["params"][0])

    def active(self) -> list[Active]:
        """The tensors of the last step, as its kernels were given them."""
        return [active for active in self._active.values() if active.tensors.params]

    @property
    def shadows(self) -> ShadowWeights | None:
        """The bf16 weights, once `bf16_weights` has made them."""
        return self._shadows

    def grad_of(self, param: Tensor) -> Tensor | None:
        """The gradient that the next `step` takes for this parameter: its own, or its shadow's in bf16."""
        leaf = self._leaf_of(param)
        return param.grad if leaf is None else leaf.grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer's, the shadows' gradients too."""
        super().zero_grad(set_to_none)
        if self._shadows is not None:
            for _, leaf in self._shadows.items():
                leaf.grad = None

    def _leaf_of(self, param: Tensor) -> Tensor | None:
        """The shadow of a parameter whose gradient stands there; where both have one it becomes the parameter's."""
        leaf = None if self._shadows is None else self._shadows.leaf_of(param)
        if leaf is None or leaf.grad is None:
            return None
        if param.grad is None:
            return leaf
        param.grad += leaf.grad
        leaf.grad = None
        return None

    def _norm(self, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The global norm and whether it is finite, both 0-d and noted for the user; eager also clips here."""
        if self._is_fused(leaves[0]):
            norm = op.global_norm([dense_grad(leaf) for leaf in leaves])
        else:
            is_eager = self.implementation != "apex"  # apex's kernel clips
            norm = op.eager_norm_and_clip(leaves, self.max_grad_norm if is_eager else None)
        is_finite = torch.isfinite(norm)
        self.grad_norm = norm
        self.skipped_steps = self.skipped_steps.to(norm.device, non_blocking=True)
        self.skipped_steps += ~is_finite
        return norm, is_finite

    def _is_fused(self, param: Tensor) -> bool:
        return self.implementation == "fused" and op.is_fused(param.device)

    def _update(self, group: dict[str, Any], tensors: op.AdamWEMATensors, norm: Tensor, is_finite: Tensor) -> None:
        leaves = tensors.shadows or tensors.params
        tensors = replace(tensors, grads=[dense_grad(leaf) for leaf in leaves])  # a copy: kept, they would live on
        beta1, beta2 = group["betas"]
        named = {name: group[name] for name in ("lr", "eps", "weight_decay", "ema_decay")}
        settings = op.AdamWEMASettings(beta1=beta1, beta2=beta2, max_grad_norm=self.max_grad_norm, **named)
        if self._is_fused(tensors.params[0]):
            tensors.steps += is_finite
            op.adamw_ema_step(tensors, norm, settings)
            if tensors.shadows is not None and self._shadows is not None:
                self._shadows.note_written(tensors.params)
        elif self.implementation == "apex":
            tensors.steps += is_finite
            op.apex(tensors, norm, is_finite, settings)
        else:
            op.eager(tensors, is_finite, settings)

    def _gather(self, index: int, group: dict[str, Any]) -> tuple[Active, Active]:
        """The group's tensors for this step: with their own gradients, and with those of their shadows."""
        check_rates(group)
        leaves = {p: self._leaf_of(p) for p in group["params"]} if self._shadows is not None else {}
        own = [p for p in group["params"] if p.grad is not None]
        shadowed = [p for p, leaf in leaves.items() if leaf is not None]
        shadows = [leaf for leaf in leaves.values() if leaf is not None]
        return self._kept((index, False), group, own, None), self._kept((index, True), group, shadowed, shadows)

    def _kept(
        self, place: tuple[int, bool], group: dict[str, Any], params: list[Tensor], shadows: list[Tensor] | None
    ) -> Active:
        """The tensors of these parameters; state is made for one that is updated for the first time."""
        has_ema = group["ema_decay"] is not None
        key = (has_ema, *map(id, params), *map(id, shadows or ()))
        kept = self._active.get(place)
        if kept is not None and kept.is_of(key, self.state):
            return kept
        states = [self._state_of(p, has_ema) for p in params]
        steps = torch.zeros(len(params), device=params[0].device if params else None)
        for i, state in enumerate(states):
            steps[i] = state["step"]
            state["step"] = steps[i]
        self._active[place] = Active(
            key=key,
            tensors=op.AdamWEMATensors(
                params=params,
                grads=[],
                exp_avgs=[s["exp_avg"] for s in states],
                exp_avg_sqs=[s["exp_avg_sq"] for s in states],
                emas=[s["ema"] for s in states] if has_ema else None,
                shadows=shadows,
                steps=steps,
            ),
            states=[dict(state) for state in states],
        )
        return self._active[place]

    def _state_of(self, param: Tensor, has_ema: bool) -> dict[str, Tensor]:
        """The state of one parameter, complete: what is missing is made, and all lies in memory as it does."""
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = laid_out_as(param, state[name]) if name in state else torch.zeros_like(param)
        if has_ema:
            state["ema"] = laid_out_as(param, state["ema"]) if "ema" in state else param.detach().clone()
        state["step"] = torch.as_tensor(state.get("step", 0), dtype=torch.float32, device=param.device)
        return state

    def _average_the_rest(self, group: dict[str, Any], is_finite: Tensor) -> None:
        """Move the averages of parameters that have one but no gradient in this step."""
        if group["ema_decay"] is None:
            return
        idle = [p for p in group["params"] if self.grad_of(p) is None and "ema" in self.state.get(p, ())]
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
        exchange(pairs)
        self._is_swapped = True
        try:
            yield
        finally:
            self._is_swapped = False
            exchange(pairs)

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
        kept = {name: self.__dict__[name] for name in own}
        return {**super().__getstate__(), **kept, "_active": {}, "_shadows": None}
