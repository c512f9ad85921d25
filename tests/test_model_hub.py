"""`save_pretrained`, `from_pretrained` and `push_to_hub`: huggingface_hub's mixin on a local folder."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch_for, small_model
from recorded.recording import load_recording
from repository import ROOT
from safetensors.torch import load_file

from sra2_fast import SiT, open_model
from sra2_fast.compat import repa, sra
from sra2_fast.errors import InputError
from sra2_fast.optim import AdamWEMA

huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")


def test_a_saved_model_comes_back_the_same(tmp_path: Path) -> None:
    model = small_model(align_depth=2, qk_norm=True, input_size=(8, 4), learn_sigma=False)
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert json.loads((tmp_path / "model/config.json").read_text()) == {**model.config(), "input_size": [8, 4]}
    again = SiT.from_pretrained(str(tmp_path / "model"))
    assert isinstance(again, huggingface_hub.PyTorchModelHubMixin) and not again.training
    assert again.config() == model.config()
    state = model.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    eager = SiT.from_pretrained(tmp_path / "model", implementation="eager")
    assert eager.implementation == "eager" and all(
        torch.equal(value, state[name]) for name, value in eager.state_dict().items()
    )


def test_the_averages_are_saved_within_a_swap(tmp_path: Path) -> None:
    model = small_model(learn_sigma=False)
    optimizer = AdamWEMA(model.named_parameters(), lr=0.1, ema_decay=0.5)
    model(*batch_for(model)).square().mean().backward()
    optimizer.step()
    with optimizer.swap_ema(model):
        model.save_pretrained(tmp_path)
    averages = optimizer.ema_state_dict()
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in averages.items())
    assert not torch.equal(saved["x_embedder.proj.bias"], model.x_embedder.proj.bias)


@pytest.mark.parametrize(("name", "module"), (("repa", repa), ("sra", sra)))
def test_repa_s_and_sra_s_classes_are_saved_as_they_are_and_open_as_ours(
    tmp_path: Path, name: str, module: Any
) -> None:
    recording = load_recording(name)
    model = module.SiT(**recording.config)
    model.load_state_dict(recording.state())
    model.save_pretrained(tmp_path)
    again = module.SiT.from_pretrained(tmp_path)
    inputs = recording["x"], recording["t"], recording["y"]
    extra = {"ad": 1} if name == "sra" else {}
    with torch.no_grad():
        want = model.eval()(*inputs, **extra)[0]
        assert torch.equal(again(*inputs, **extra)[0], want)
        ours, about = open_model(tmp_path)
        torch.testing.assert_close(ours(*inputs), want, rtol=0, atol=1e-5)
    assert about.source == name and again.config() == model.config()


def test_a_folder_of_save_pretrained_opens_with_open_model(tmp_path: Path) -> None:
    model = small_model(learn_sigma=False).eval()
    model.save_pretrained(tmp_path)
    opened, about = open_model(tmp_path)
    inputs = batch_for(model)
    assert torch.equal(opened(*inputs), model(*inputs)) and about.source == "sra2_fast"
    (tmp_path / "config.json").write_text(json.dumps({**model.config(), "depth": 2}))
    with pytest.raises(InputError, match=r"blocks\.2\..* is \(288,\) there and absent in a SiT"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=rf"checkpoint {tmp_path}: cannot be read .*; save it again"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has a config\.json and no model\.safetensors"):
        open_model(tmp_path)


def test_weights_of_another_model_are_an_error(tmp_path: Path) -> None:
    """The mixin's own default lets missing and unexpected weights pass in silence."""
    small_model(learn_sigma=False).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*projector"):
        SiT.from_pretrained(tmp_path, align_depth=1)
    assert SiT.from_pretrained(tmp_path, align_depth=1, strict=False).projector is not None


def test_the_card_says_what_the_model_is_and_how_it_is_used(tmp_path: Path) -> None:
    small_model(learn_sigma=False).save_pretrained(tmp_path, model_card_kwargs={"autoencoder": "sd-vae, 0.18215"})
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "sra2_fast" and "sit" in card.data.tags
    assert "| blocks, width, heads, patch | 3, 48, 3, 2 |" in card.text and "t = 0 is data" in card.text
    assert "sd-vae, 0.18215" in card.text and "(channels, height, width) | 4, 8, 8 |" in card.text


def test_the_card_s_example_runs(tmp_path: Path) -> None:
    small_model(learn_sigma=False).save_pretrained(tmp_path, model_card_kwargs={"repo_id": str(tmp_path)})
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["latents"].shape == (4, 4, 8, 8) and names["latents"].isfinite().all()


def test_push_to_hub_uploads_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, **given: Any) -> None: ...

        def create_repo(self, repo_id: str, **given: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **given: Any) -> str:
            uploaded["name"] = repo_id
            uploaded["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return "address"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = small_model(learn_sigma=False)
    assert model.push_to_hub("someone/sit-small") == "address"
    assert uploaded["name"] == "someone/sit-small"
    assert b'from_pretrained("someone/sit-small")' in uploaded["files"]["README.md"]
    model.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert uploaded["files"][name] == (tmp_path / name).read_bytes()


def test_the_mixin_leaves_copies_and_configurations_alone() -> None:
    model = small_model(align_depth=1)
    twin = copy.deepcopy(model)
    assert twin.config() == model.config() and type(model)(**model.config()).config() == model.config()


@pytest.mark.slow
def test_without_huggingface_hub_everything_else_works_and_the_methods_say_what_is_missing() -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None
from sra2_fast import SiT
model = SiT(8, 2, 4, 48, 2, 3, num_classes=3)
for call in (lambda: model.save_pretrained("x"), lambda: SiT.from_pretrained("x"), lambda: model.push_to_hub("x")):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    line = "SiT: from_pretrained, save_pretrained and push_to_hub need huggingface_hub; pip install it"
    assert done.stdout.splitlines() == [line] * 3
