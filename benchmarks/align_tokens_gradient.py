"""What `align_tokens` does to a step's gradient: how far that of a share of the tokens lies from that of all of them.

    python benchmarks/align_tokens_gradient.py [--batch-size 8] [--steps 40] [--draws 8]

The width and tokens of SiT-S/2 (384, N = 256) with four of its blocks, on digits enlarged to 4x32x32 with noise of std
0.6 on top, since the digits alone are smoother than an autoencoder's latents. Before training and after `--steps`
steps: cosine similarity and |g_f - g| / |g| of the alignment's gradient in the head and in the trunk, and of the whole
gradient in the trunk, means over `--draws` subsets. "other images" is another batch with all tokens: the spread that
any step has already.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from sra2_fast import SiT, SRA2Loss
from sra2_fast.data import Batch, make_loader, open_data
from sra2_fast.optim import AdamWEMA
from sra2_fast.train.diagnosis import StepHistory
from sra2_fast.train.step import TrainStep

SHARES = (0.5, 0.25)
CPU = torch.device("cpu")


def enlarged(batch: Batch, seed: int) -> Batch:
    """(B, 1, 8, 8) digits -> 4x32x32, and noise as large."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.tensor([1.0, -1.0, 0.5, -0.5])[:, None, None]
    image = F.interpolate(batch.latents, size=(32, 32), mode="bicubic") * signs
    noise, grain = torch.randn(2, *image.shape, generator=generator)
    return batch._replace(latents=image + 0.6 * grain, noise=noise)


def gradients(model: SiT, batch: Batch, share: float) -> dict[str, Tensor]:
    """The alignment's gradient in the head and in the trunk, and the trunk's of the whole loss; flat."""
    loss_fn, alone = SRA2Loss(align_tokens=share), SRA2Loss(align=None)
    given = loss_fn.draws(
        batch.latents, 0.0, noise=batch.noise, t=batch.time_uniform, token_uniform=batch.token_uniform
    )
    totals = [one(model, batch.latents, batch.labels, **given._asdict()).total for one in (loss_fn, alone)]
    align, velocity = (dict(zip(_names(model), _gradient(model, total), strict=True)) for total in totals)
    trunk = [name for name in align if not name.startswith("projector")]
    align = {name: value - velocity[name] for name, value in align.items()}
    return {
        "head, alignment": torch.cat([value.flatten() for name, value in align.items() if name not in trunk]),
        "trunk, alignment": torch.cat([align[name].flatten() for name in trunk]),
        "trunk, whole loss": torch.cat([(align[name] + velocity[name]).flatten() for name in trunk]),
    }


def _names(model: SiT) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _gradient(model: SiT, total: Tensor) -> list[Tensor]:
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, weights, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]


def compare(model: SiT, batch: Batch, other: Batch, draws: int) -> dict[str, dict[str, tuple[float, float]]]:
    """{share or "other images": {part: (cosine similarity, relative error)}}, means over the draws."""
    whole = gradients(model, batch, 1.0)
    generator = torch.Generator().manual_seed(1)
    uniforms = [torch.rand(len(batch.labels), generator=generator) for _ in range(draws)]
    found = {"other images": [gradients(model, other, 1.0)]}
    for share in SHARES:
        found[str(share)] = [gradients(model, batch._replace(token_uniform=u), share) for u in uniforms]
    return {
        name: {part: _distance(whole[part], [g[part] for g in each]) for part in whole} for name, each in found.items()
    }


def _distance(whole: Tensor, found: list[Tensor]) -> tuple[float, float]:
    cosines = [float(F.cosine_similarity(one, whole, dim=0)) for one in found]
    errors = [float((one - whole).norm() / whole.norm()) for one in found]
    return sum(cosines) / len(found), sum(errors) / len(found)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="align_tokens_gradient", description="The gradient of a share of the tokens.")
    parser.add_argument("--batch-size", type=int, default=8, help="images [%(default)s]")
    parser.add_argument("--steps", type=int, default=40, help="of training before the second table [%(default)s]")
    parser.add_argument("--draws", type=int, default=8, help="subsets of each share [%(default)s]")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 384, "depth": 4, "num_heads": 6}
    model = SiT(**sizes, num_classes=10, learn_sigma=False, align_depth=2, projector_layers=5)
    history = StepHistory(max(args.steps, 1), CPU)
    optimizer = AdamWEMA(model.named_parameters(), lr=3e-4)
    step = TrainStep(model, SRA2Loss(), optimizer, history, device=CPU)
    loader = make_loader(open_data("digits"), batch_size=args.batch_size, seed=0, num_steps=args.steps + 2)
    batches = [enlarged(batch, seed) for seed, batch in enumerate(loader)]
    for done in (0, args.steps):
        for batch in batches[step.step : done]:
            align = float(step([batch]).align)
        print(f"after {done} steps" + (f", alignment loss {align:.3f}" if done else ""))
        for name, parts in compare(model.eval(), *batches[-2:], args.draws).items():
            figures = (f"{part}: cosine {cos:.3f}, error {error:.3f}" for part, (cos, error) in parts.items())
            print(f"  {name:12} " + ";  ".join(figures), flush=True)
        model.train()


if __name__ == "__main__":
    main()
