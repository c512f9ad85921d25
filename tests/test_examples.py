"""examples/: each runs, on a few steps, and learns what it says; and what they rely on in diffusers and peft holds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from repository import ROOT
from test_structure import tracked
from torch import nn

from sra2_fast import Aligner
from sra2_fast.ops.patchify import patchify

pytestmark = [pytest.mark.slow, pytest.mark.training]

pytest.importorskip("diffusers")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def aligns(history: list[float], by: float = 0.1) -> bool:
    """Whether the alignment fell: the mean of the last three losses is well below that of the first."""
    assert all(value == value for value in history)
    return sum(history[-3:]) / 3 < history[0] - by


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    for name in tracked("examples/*.py"):
        assert f'"{Path(name).stem}"' in text, f"{name} is run by no test"


@pytest.mark.parametrize("name", ("align_dit", "align_sd3", "align_video"))
def test_diffusers_transformers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    history = example(name).main(steps=12, log_every=6)
    assert len(history) == 12 and aligns(history)
    assert capsys.readouterr().out.count("alignment") == 2


def test_lora() -> None:
    pytest.importorskip("peft")
    assert aligns(example("align_lora").main(steps=16))


def test_compile() -> None:
    torch._dynamo.reset()
    assert aligns(example("align_compile").main(steps=12, backend="aot_eager"))


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From photographs to samples, on a handful: every command ends well and leaves what it says."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("sklearn")
    grid = example("quickstart").main(str(tmp_path / "run"), crops=8, autoencoder_steps=8, steps=4)
    assert grid == tmp_path / "run" / "samples" / "grid.png" and image.open(grid).size[0] >= 4 * 32
    assert len(list((tmp_path / "run" / "samples" / "images").glob("*.png"))) == 16
    said = capsys.readouterr().out
    assert said.count("$ sra2-fast ") == 4 and "16 latents of 4x16x16, each mirrored too, 2 classes" in said
    assert re.search(r"decoded 8 of them: PSNR \d+\.\d dB on average", said)
    assert image.open(tmp_path / "run" / "latents" / "verify.png").size[0] >= 4 * 64


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_ddp(process_group: None) -> None:
    """One process; tests/test_distributed.py compares the gradients of two with those of one."""
    assert aligns(example("align_ddp").main(steps=12))


def small_dit(**changes: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "num_embeds_ada_norm": 10}
    return DiTTransformer2DModel(in_channels=4, sample_size=8, patch_size=2, **{**sizes, **changes})


@pytest.mark.parametrize("name", ("DiTTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"))
def test_tokens_lie_in_the_order_of_patchify(name: str) -> None:
    """One patch of the latent moves one token, and it is the one at the patch's place."""
    import diffusers

    sizes: dict[str, Any] = {"in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    if name == "SD3Transformer2DModel":
        sizes |= {"joint_attention_dim": 8, "caption_projection_dim": 24, "pooled_projection_dim": 8}
    if name == "WanTransformer3DModel":
        sizes |= {"text_dim": 8, "freq_dim": 8, "ffn_dim": 8, "rope_max_seq_len": 8}
    else:
        sizes |= {"sample_size": 8, "patch_size": 2}
    model = getattr(diffusers, name)(**sizes)
    is_video = name == "WanTransformer3DModel"
    shape, patch = ((1, 4, 2, 8, 8), (1, 2, 2)) if is_video else ((1, 4, 8, 8), (2, 2))
    latents = torch.zeros(shape)
    latents[..., 2, 6] = 1.0  # row 1, column 3 of a grid of 4 x 4, in every frame

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return model.patch_embedding(x).flatten(2).mT if is_video else model.pos_embed(x)

    moved = (tokens(latents) - tokens(torch.zeros(shape))).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == ([7, 16 + 7] if is_video else [7])
    assert torch.equal(moved, patchify(latents, patch).any(-1)[0])


def test_the_alignment_reaches_the_adapters_before_the_layer_and_nothing_else() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model = peft.get_peft_model(small_dit(), config)
    aligner = Aligner(model, "transformer_blocks.1", latent_channels=4, patch_size=2, grid=(4, 4))
    latents = torch.randn(2, 4, 8, 8)
    model(latents, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2]))
    aligner(latents).total.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert reached == {name for name in adapters if ".2." not in name.split("transformer_blocks")[1][:3]}
    assert len(reached) == 8 and all("lora_" in name for name in reached)
    assert not any("projector" in name for name in peft.get_peft_model_state_dict(model))


def test_gradient_checkpointing_of_diffusers_changes_no_gradient() -> None:
    latents, model = torch.randn(2, 4, 8, 8), small_dit()
    aligner = Aligner(model, "transformer_blocks.1", latent_channels=4, patch_size=2, grid=(4, 4))
    found = []
    for is_recomputed in (False, True):
        if is_recomputed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(3)  # DiT drops labels while it trains
        out = model(latents, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([1, 2]), return_dict=False)[0]
        aligner(latents, out, latents).total.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    history = example("accelerate_loop").main(out=str(tmp_path), steps=6)
    assert len(history) == 12 and sum(history[-4:]) < sum(history[:4])
    assert {"model.safetensors", "optimizer.bin", "ema.safetensors"} <= {path.name for path in tmp_path.iterdir()}
