"""Records what the public SiT, REPA and SRA models compute, for the tests that hold ours to them.

    python tests/recorded/record.py --sit SIT --repa REPA --sra SRA --repa-e REPA_E --lightningdit LIGHTNINGDIT

where these are checkouts of willisma/SiT, sihyun-yu/REPA, vvvvvjdy/SRA, End2End-Diffusion/REPA-E and
hustvl/LightningDiT, in an environment with torch, timm, numpy, einops and safetensors. The recordings beside this file
come from `SIT/models.py` at a87098c, `REPA/models/sit.py` at 2b8c181, `SRA/SiT-SRA/models/sit.py` at 3a22705,
`REPA_E/models/sit.py` at 3ad8046 and `LIGHTNINGDIT/models/lightningdit.py` at 2725fed, with torch 2.13.0 (CPU, one
thread) and timm 1.0.12 (a 1.0.x whose Attention gives qk_norm a LayerNorm by itself, as those repositories expect;
1.0.31 does not).

Each `NAME.safetensors` holds `state.*` (the reference's state dict: random, nothing left at zero, rounded to bfloat16,
which float32 holds exactly), the inputs, the outputs, the fixed output gradients and, as `grad.*`, the gradient of
every trainable parameter and of `x`, all from the reference itself in float32. Of REPA-E and LightningDiT, which are
only converted, there is the velocity in evaluation. Its header holds `config` (the
reference constructor's arguments) and `keys` (name, shape, trainable; in the order of the reference).
`reference.json` holds the registries' parameter counts, the signatures of constructors and forwards, and the statistics
of the reference's own initial weights.
Nothing of those repositories' code is kept here.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # LightningDiT compiles its layers where they are defined

import torch
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).parent
BASE = {"input_size": 8, "hidden_size": 24, "num_heads": 3, "num_classes": 10}
INIT = {"input_size": 16, "patch_size": 2, "hidden_size": 96, "depth": 2, "num_heads": 4, "num_classes": 100}
INIT_SEEDS = 8


def load_module(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomise(model: nn.Module, seed: int) -> None:
    """Every parameter but the fixed positions: random, of a size that keeps the outputs near one."""
    generator = torch.Generator().manual_seed(seed)
    has_qk_norm = any("q_norm" in name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            continue
        draw = torch.randn(parameter.shape, generator=generator)
        if name.endswith("_norm.weight"):
            draw = 1 + 0.3 * draw
        elif parameter.dim() == 1:
            draw = 0.3 * draw
        elif not name.endswith("embedding_table.weight"):
            draw = draw / parameter[0].numel() ** 0.5
        if has_qk_norm and ".attn.qkv." in name:
            draw[: 2 * len(draw) // 3] /= 16  # small queries and keys, or the eps of their norm would not show
        parameter.data.copy_(draw.bfloat16())


def describe(model: nn.Module, config: dict[str, object]) -> dict[str, str]:
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    keys = [[name, list(value.shape), trainable[name]] for name, value in model.state_dict().items()]
    return {"config": json.dumps(config), "keys": json.dumps(keys)}


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        state[f"state.{name}"] = value.clone() if name == "pos_embed" else value.bfloat16()
    return state


def make_inputs(config: dict[str, object], seed: int, batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, int(config["in_channels"]), 8, 8)  # type: ignore[call-overload]
    return {
        "x": torch.randn(shape, generator=generator),
        "t": torch.tensor([0.0, 0.37, 1.0, 0.81])[:batch],
        "y": torch.tensor([0, 9, 4, 7])[:batch],
    }


def gradients(
    model: nn.Module, outputs: dict[str, torch.Tensor], x: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """d<output> fixed and random; `grad.*` is what they pull back onto the parameters and onto x."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = {name: torch.randn(value.shape, generator=generator) for name, value in outputs.items()}
    torch.autograd.backward(list(outputs.values()), list(cotangents.values()))
    found = {f"d{name}": value for name, value in cotangents.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[f"grad.{name}"] = parameter.grad.clone()
    assert x.grad is not None
    found["grad.x"] = x.grad.clone()
    return found


def force_drops(model: nn.Module, drop: torch.Tensor) -> None:
    """The reference's forward has no argument for it, its label embedder has."""
    model.y_embedder.forward = partial(model.y_embedder.forward, force_drop_ids=drop)  # type: ignore


def write(name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors", metadata)


def record_sit(module: types.ModuleType, name: str, seed: int, **changes: object) -> None:
    config = {**BASE, "patch_size": 2, "in_channels": 4, "depth": 3, "learn_sigma": True, **changes}
    model = module.SiT(**config)
    randomise(model, seed)
    record = {**stored_state(model), **make_inputs(config, seed)}
    x, t, y = record["x"], record["t"], record["y"]
    model.eval()
    with torch.no_grad():
        record["velocity_eval"] = model(x, t, y)
        null = torch.full((2,), 10 if config.get("class_dropout_prob", 0.1) else 3)
        record["cfg_t"], record["cfg_y"] = torch.full((4,), 0.63), torch.cat([torch.tensor([1, 8]), null])
        record["cfg_x"] = torch.cat([x[:2], x[:2]])
        record["cfg_velocity"] = model.forward_with_cfg(record["cfg_x"], record["cfg_t"], record["cfg_y"], 3.5)
    model.train()
    if config.get("class_dropout_prob", 0.1):
        record["drop"] = torch.tensor([0, 1, 0])
        force_drops(model, record["drop"])
    x_leaf = x.clone().requires_grad_()
    outputs = {"velocity": model(x_leaf, t, y)}
    record |= outputs | gradients(model, outputs, x_leaf, seed + 1)
    write(name, record, describe(model, config))


def record_repa(module: types.ModuleType, name: str, seed: int, **changes: object) -> None:
    config = {**BASE, "patch_size": 2, "in_channels": 4, "depth": 2, "path_type": "linear", "decoder_hidden_size": 24}
    config |= {"encoder_depth": 1, "z_dims": [20, 12], "projector_dim": 32, "use_cfg": True, **changes}
    model = module.SiT(**config)
    randomise(model, seed)
    record = {**stored_state(model), **make_inputs(config, seed)}
    x, t, y = record["x"], record["t"], record["y"]
    model.eval()
    with torch.no_grad():
        record["velocity_eval"] = model(x, t, y)[0]
    model.train()
    record["drop"] = torch.tensor([0, 1, 0])
    force_drops(model, record["drop"])
    x_leaf = x.clone().requires_grad_()
    velocity, zs = model(x_leaf, t, y)
    outputs = {"velocity": velocity, **{f"z{k}": z for k, z in enumerate(zs)}}
    record |= outputs | gradients(model, outputs, x_leaf, seed + 1)
    write(name, record, describe(model, config))


def record_sra(module: types.ModuleType, name: str, seed: int) -> None:
    config = {**BASE, "patch_size": 2, "in_channels": 4, "depth": 3, "path_type": "linear", "decoder_hidden_size": 24}
    config |= {"use_cfg": True, "fused_attn": True, "qk_norm": False}
    model = module.SiT(**config)
    randomise(model, seed)
    record = {**stored_state(model), **make_inputs(config, seed)}
    x, t, y = record["x"], record["t"], record["y"]
    model.eval()
    with torch.no_grad():
        record["velocity_eval"], record["hidden_eval"], record["labels_eval"] = model(x, t, y, ad=3)
    model.train()
    record["drop"] = torch.tensor([0, 1, 0])
    force_drops(model, record["drop"])
    x_leaf = x.clone().requires_grad_()
    velocity, projection, record["labels_train"] = model(x_leaf, t, y, ad=2)
    outputs = {"velocity": velocity, "projection": projection}
    record |= outputs | gradients(model, outputs, x_leaf, seed + 1)
    write(name, record, describe(model, config))


def record_repa_e(module: types.ModuleType, seed: int) -> None:
    config = {**BASE, "patch_size": 2, "in_channels": 4, "depth": 2, "path_type": "linear", "decoder_hidden_size": 24}
    config |= {"encoder_depth": 1, "z_dims": [20], "projector_dim": 32, "qk_norm": False, "fused_attn": True}
    model = module.SiT(**config)
    randomise(model, seed)
    model.init_bn(latents_scale=torch.tensor([0.5, 0.7, 1.0, 1.25]), latents_bias=torch.tensor([0.1, -0.2, 0.0, 0.3]))
    record_evaluation("repa_e", model, model.inference, config, seed)


def record_lightningdit(module: types.ModuleType, seed: int) -> None:
    config = {**BASE, "patch_size": 1, "in_channels": 16, "depth": 2, "input_size": 4, "use_qknorm": True}
    model = module.LightningDiT(**config)
    randomise(model, seed)
    record_evaluation("lightningdit", model, model, config, seed)


def record_evaluation(name: str, model: nn.Module, call: Callable, config: dict[str, object], seed: int) -> None:
    """State dict (buffers in full precision), inputs, and the velocity in evaluation."""
    side = config["input_size"]
    generator = torch.Generator().manual_seed(seed)
    record = {**stored_state(model), **make_inputs(config, seed)}
    record |= {f"state.{key}": value for key, value in model.named_buffers()}
    record["x"] = torch.randn(3, config["in_channels"], side, side, generator=generator)
    model.eval()
    with torch.no_grad():
        record["velocity_eval"] = call(record["x"], record["t"], record["y"])
    trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    keys = [[key, list(value.shape), trainable.get(key, False)] for key, value in model.state_dict().items()]
    write(name, record, {"config": json.dumps(config), "keys": json.dumps(keys)})


def initial_statistics(build: partial) -> dict[str, list[float]]:
    """{parameter: [mean, standard deviation, largest magnitude]} over INIT_SEEDS reference models."""
    draws: dict[str, list[torch.Tensor]] = {}
    for seed in range(INIT_SEEDS):
        torch.manual_seed(seed)
        for name, parameter in build().named_parameters():
            draws.setdefault(name, []).append(parameter.detach().double().flatten())
    found = {}
    for name, values in draws.items():
        every = torch.cat(values)
        found[name] = [float(every.mean()), float(every.std()), float(every.abs().max())]
    return found


def registry_counts(module: types.ModuleType, **arguments: object) -> dict[str, int]:
    """Parameters of every registered model; on the meta device, so no memory is taken."""
    counts = {}
    for name, build in module.SiT_models.items():
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in build(**arguments).parameters())
    return counts


def signature(function: Callable) -> list[list[object]]:
    """[[argument, default or None, has a default], ...] without self."""
    arguments = list(inspect.signature(function).parameters.values())[1:]
    empty = inspect.Parameter.empty
    return [[a.name, None if a.default is empty else a.default, a.default is not empty] for a in arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for repository in ("sit", "repa", "sra", "repa-e", "lightningdit"):
        parser.add_argument(f"--{repository}", type=Path, required=True, help="a checkout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sit = load_module(args.sit / "models.py", "reference_sit")
    repa = load_module(args.repa / "models" / "sit.py", "reference_repa")
    sra = load_module(args.sra / "SiT-SRA" / "models" / "sit.py", "reference_sra")
    repa_e = load_module(args.repa_e / "models" / "sit.py", "reference_repa_e")
    sys.path.insert(0, str(args.lightningdit))
    lightningdit = load_module(args.lightningdit / "models" / "lightningdit.py", "reference_lightningdit")

    record_sit(sit, "sit", 1)
    record_sit(sit, "sit_one_channel", 2, learn_sigma=False, in_channels=1, depth=2)
    record_sit(sit, "sit_patch4", 3, patch_size=4, in_channels=3, depth=2, mlp_ratio=2.5, class_dropout_prob=0.0)
    record_repa(repa, "repa", 4, qk_norm=False, fused_attn=True)
    record_repa(repa, "repa_qk_norm", 5, qk_norm=True, fused_attn=False, encoder_depth=2)
    record_sra(sra, "sra", 6)
    record_repa_e(repa_e, 7)
    record_lightningdit(lightningdit, 8)

    facts: dict[str, Any] = {
        "registry": {"sit": registry_counts(sit), "repa": registry_counts(repa, qk_norm=False)},
        "init": {
            "config": INIT,
            "seeds": INIT_SEEDS,
            "sit": initial_statistics(partial(sit.SiT, **INIT)),
            "repa": initial_statistics(partial(repa.SiT, **INIT, decoder_hidden_size=96, qk_norm=True)),
            "sra": initial_statistics(partial(sra.SiT, **INIT, decoder_hidden_size=96, qk_norm=False)),
        },
    }
    facts["registry"]["sra"] = registry_counts(sra, qk_norm=False)
    facts["signature"] = {
        name: {"init": signature(module.SiT.__init__), "forward": signature(module.SiT.forward)}
        for name, module in (("sit", sit), ("repa", repa), ("sra", sra))
    }
    (HERE / "reference.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
