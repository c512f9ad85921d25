"""What a run starts from and what of it is trained: `--init`, `--init-positions`, `--freeze`, `--lr-scale`.

Patterns are those of shells (`blocks.0.*`), matched against parameter names, several separated by commas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import OpenedWeights, open_weights
from ..checkpoints.configuration import Told, registry_name
from ..checkpoints.conventions import drop_sigma, has_sigma
from ..errors import InputError, must_be
from ..layers.patch_embedding import sincos_positions
from ..models import SiT
from .options import TrainOptions

LABELS = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
POSITIONS_TOLERANCE = 2.0**-7  # tables that went through bfloat16 are tables still


def load_initial(model: SiT, options: TrainOptions, latents: dict[str, Any]) -> list[str]:
    """Copy the weights that --init names into the model, as far as it has a place for them; lines on what is new.

    latents: how this run's latents become images again, as state.json has it.
    The averaged ones, where there are averages. New, and as the seed has them: labels of another number of classes
    (the null label is kept), a projector of other sizes, positions of another grid.
    Raises InputError naming --init where the sizes are not the model's.
    """
    assert options.init is not None
    opened = open_weights(options.init, told=Told(num_heads=model.num_heads))
    _check_sizes(model, opened, options)
    state, new = drop_sigma(opened.state) if has_sigma(opened.state) else dict(opened.state), []
    own = {name: one.detach() for name, one in model.state_dict().items()}
    if not _same_shapes(own, state, "projector."):
        new += ["the projector"] if model.projector is not None else []
        state = {name: one for name, one in state.items() if not name.startswith("projector.")}
        state |= {name: one for name, one in own.items() if name.startswith("projector.")}
    state[LABELS], is_new = _labels(model, own[LABELS], opened)
    new += [f"{model.num_classes} labels (not {opened.config['num_classes']})"] if is_new else []
    state[POSITIONS], is_new = _positions(model, own[POSITIONS], opened, options)
    new += [f"positions, {options.init_positions}d for {'x'.join(map(str, model.latent_size))}"] if is_new else []
    model.load_state_dict(state)
    about = f"{opened.weights} of step {opened.step}" if opened.step else opened.weights
    notes = [f"starting from {opened.file} ({opened.source}, {about}){'; new: ' if new else ''}{', '.join(new)}"]
    if opened.path not in (None, options.path):
        notes.append(f"{opened.file} was trained on the {opened.path} path, this run is on --path {options.path}")
    if opened.latents is not None and not _same_normalisation(opened.latents, latents):
        notes.append(
            f"{opened.file} was trained on latents with another shift or scale ({opened.latents['shift']}, "
            f"{opened.latents['scale']}, here {latents['shift']}, {latents['scale']})"
        )
    return [*notes, *opened.notes]


def freeze(model: nn.Module, patterns: str) -> None:
    """Leave out of training every parameter that a pattern matches.

    Raises InputError for a pattern that matches nothing, and where nothing is left to train.
    """
    for pattern in patterns.split(","):
        for _, parameter in _matching(model, pattern.strip(), "--freeze"):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"train: --freeze {patterns} leaves nothing to train; give narrower patterns")


def parameter_groups(model: nn.Module, lr_scale: str | None) -> Any:
    """What the optimizer is given: all parameters by name, or a group of them for every factor of the learning rate.

    lr_scale: "pattern=factor,..."; the last pattern that matches a parameter counts.
    """
    named = dict(model.named_parameters())
    if lr_scale is None:
        return named.items()
    factors = dict.fromkeys(named, 1.0)
    for part in lr_scale.split(","):
        pattern, _, text = part.strip().rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not pattern or not 0 <= factor < math.inf:
            raise must_be("train", "--lr-scale", "PATTERN=FACTOR,... with factors of 0 or more", part.strip())
        factors |= {name: factor for name, _ in _matching(model, pattern, "--lr-scale")}
    return [
        {"params": [(name, named[name]) for name, own in factors.items() if own == factor], "lr_scale": factor}
        for factor in dict.fromkeys(factors.values())
    ]


def _matching(model: nn.Module, pattern: str, option: str) -> Iterator[tuple[str, nn.Parameter]]:
    found = [(name, parameter) for name, parameter in model.named_parameters() if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(f"train: {option} {pattern} matches no parameter; names are as blocks.0.attn.qkv.bias")
    return iter(found)


def _check_sizes(model: SiT, opened: OpenedWeights, options: TrainOptions) -> None:
    """Raise InputError unless the blocks and the patches are those of the model."""
    here, there = model.config(), opened.config
    options_of = {"in_channels": "latents with that many channels", "qk_norm": "--qk-norm as it was trained"}
    names = ("hidden_size", "depth", "num_heads", "patch_size", "mlp_ratio", "in_channels", "qk_norm")
    defaults = {"mlp_ratio": 4.0, "qk_norm": False}
    for name in names:
        value = there.get(name, defaults.get(name))
        if value != here[name]:
            way_out = options_of.get(name, f"--model {registry_name(there)}")
            raise InputError(f"train: --init {options.init} has {name} {value}, this run {here[name]}; give {way_out}")


def _same_normalisation(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether shifts and scales agree to a hundredth of the latents' spread."""
    if there["kind"] != here["kind"]:
        return False
    of_both = [[torch.tensor(one[name]).double() for one in (there, here)] for name in ("shift", "scale")]
    (shift, own_shift), (scale, own_scale) = of_both
    shifted = (shift - own_shift).abs() * own_scale
    return bool(((scale / own_scale - 1).abs() <= 0.01).all() and (shifted <= 0.01).all())


def _same_shapes(own: dict[str, Tensor], state: dict[str, Tensor], start: str) -> bool:
    shapes = [{name: one.shape for name, one in these.items() if name.startswith(start)} for these in (own, state)]
    return shapes[0] == shapes[1]


def _labels(model: SiT, own: Tensor, opened: OpenedWeights) -> tuple[Tensor, bool]:
    """(the label table, whether its classes are new): the null label, the last row, is kept where both have one."""
    theirs, classes = opened.state[LABELS], opened.config["num_classes"]
    table = own.clone()
    is_new = classes != model.num_classes
    if not is_new:
        table[:classes] = theirs[:classes]
    if len(table) > model.num_classes and len(theirs) > classes:
        table[model.num_classes] = theirs[classes]
    return table, is_new


def _positions(model: SiT, own: Tensor, opened: OpenedWeights, options: TrainOptions) -> tuple[Tensor, bool]:
    theirs = opened.state[POSITIONS]
    there = opened.config["input_size"]
    height, width = (there, there) if isinstance(there, int) else there
    grid = (height // model.patch_size, width // model.patch_size)
    if grid == model.grid:
        return theirs, False
    if options.init_positions == "recompute":
        return own, True
    if (theirs - sincos_positions(model.hidden_size, grid)).abs().max() > POSITIONS_TOLERANCE:
        raise InputError(
            f"train: --init {options.init} has positions that are not the sine-cosine table of {grid[0]}x{grid[1]} "
            "tokens, so they cannot be spread over another grid; give --init-positions recompute"
        )
    return sincos_positions(model.hidden_size, model.grid, over=grid)[None].to(torch.float32), True
