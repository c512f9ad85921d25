"""Records what the samplers of the public REPA and SiT repositories make of noise, to hold ours to them.

    python tests/recorded/record_samplers.py --sit SIT --repa REPA

with the checkouts and the environment of `record.py`, and torchdiffeq. `samplers.safetensors` comes from REPA's
`samplers.py` at 67f7145 and SiT's `transport/` at 947f95b, run on their own models with the weights that `repa` and
`sit` (beside this file) record, in float32 on a CPU with one thread.

It holds the starting noise and labels, every output under its name (`CASES` says how it was made) and, as
`NAME.draws`, the noise a stochastic one drew, (steps - 1, B, C, H, W). The header's `cases` are the arguments of ours
that mean the same. REPA writes 1000 for the null label whatever the model, so its model is given labels cut off at the
null label. Nothing of those repositories' code is kept here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import load_module
from recording import load_recording
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
STEPS = 8
GUIDED = {"cfg_scale": 2.5}
INTERVAL = {**GUIDED, "guidance_interval": [0.2, 0.7]}
CASES: dict[str, dict[str, Any]] = {
    "repa_euler": {"method": "euler"},
    "repa_euler_guided": {"method": "euler", **INTERVAL},
    "repa_heun": {"method": "heun"},
    "repa_heun_guided": {"method": "heun", **INTERVAL},
    "repa_sde": {"path": "linear"},
    "repa_sde_guided": {"path": "linear", **INTERVAL},
    "repa_sde_cosine": {"path": "cosine", **GUIDED},
    "sit_euler": {"method": "euler"},
    "sit_euler_guided": {"method": "euler", **GUIDED, "guided_channels": 3},
    "sit_dopri5": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6},
    "sit_sde": {"path": "linear"},
    "sit_sde_guided": {"path": "linear", **GUIDED, "guided_channels": 3},
    "sit_sde_cosine": {"path": "cosine"},
}


def with_draws(call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `call` returns, and every normal it drew."""
    drawn: list[Tensor] = []

    def keeping(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def keep(*args: Any, **kwargs: Any) -> Tensor:
            drawn.append(draw(*args, **kwargs))
            return drawn[-1]

        return keep

    with (
        mock.patch.object(torch, "randn", keeping(torch.randn)),
        mock.patch.object(torch, "randn_like", keeping(torch.randn_like)),
    ):
        return call(), drawn


def repa_sample(samplers: Any, model: Any, name: str, noise: Tensor, labels: Tensor) -> Tensor:
    case = CASES[name]
    null = model.num_classes
    low, high = case.get("guidance_interval", [0.0, 1.0])
    is_sde = "path" in case
    sampler = samplers.euler_maruyama_sampler if is_sde else samplers.euler_sampler
    return sampler(
        lambda x, t, y: model(x, t, y.clamp(max=null)),
        noise,
        labels,
        num_steps=STEPS,
        heun=case.get("method") == "heun",
        cfg_scale=case.get("cfg_scale", 1.0),
        guidance_low=low,
        guidance_high=high,
        path_type=case.get("path", "linear"),
    )


def sit_sample(transport: Any, model: Any, name: str, noise: Tensor, labels: Tensor) -> Tensor:
    case = CASES[name]
    path = "GVP" if case.get("path") == "cosine" else "Linear"
    sampler = transport.Sampler(transport.create_transport(path))
    if "path" in case:  # its "linear" form of the diffusion is 1 - t on every path, as REPA has it
        form = "sigma" if path == "Linear" else "linear"
        sample = sampler.sample_sde(diffusion_form=form, num_steps=STEPS, last_step="Mean", last_step_size=0.04)
    elif case["method"] == "dopri5":
        sample = sampler.sample_ode(num_steps=2, rtol=case["rtol"], atol=case["atol"])
    else:  # it counts the points in time, one more than the steps
        sample = sampler.sample_ode(sampling_method=case["method"], num_steps=STEPS + 1)
    if "cfg_scale" not in case:
        return sample(noise, model.forward, y=labels)[-1]
    both = torch.cat([labels, torch.full_like(labels, model.y_embedder.num_classes)])
    doubled = sample(torch.cat([noise, noise]), model.forward_with_cfg, y=both, cfg_scale=case["cfg_scale"])[-1]
    return doubled.chunk(2)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for repository in ("sit", "repa"):
        parser.add_argument(f"--{repository}", type=Path, required=True, help="a checkout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(args.sit))
    models = {}
    for name, path in (("repa", args.repa / "models" / "sit.py"), ("sit", args.sit / "models.py")):
        recording = load_recording(name)
        models[name] = load_module(path, f"reference_{name}").SiT(**recording.config).eval().requires_grad_(False)
        models[name].load_state_dict(recording.state())
    samplers = load_module(args.repa / "samplers.py", "reference_samplers")
    import transport

    generator = torch.Generator().manual_seed(9)
    noise, labels = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([0, 9, 4])
    record = {"noise": noise, "labels": labels}
    for number, name in enumerate(CASES):
        torch.manual_seed(number)
        kind = name.partition("_")[0]
        run = repa_sample if kind == "repa" else sit_sample
        with torch.no_grad():
            public = samplers if kind == "repa" else transport
            made, drawn = with_draws(lambda: run(public, models[kind], name, noise, labels))  # noqa: B023 - called here
        record[name] = made.float()
        if drawn:
            record[f"{name}.draws"] = torch.stack([draw[: len(noise)].float() for draw in drawn])
        print(name, float(record[name].std()), [tuple(draw.shape) for draw in drawn][:1])
    save_file(record, HERE / "samplers.safetensors", {"cases": json.dumps(CASES), "steps": str(STEPS)})


if __name__ == "__main__":
    main()
