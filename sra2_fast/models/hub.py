"""`SiT.from_pretrained`, `save_pretrained`, `push_to_hub`: huggingface_hub's mixin, with our configuration and card.

A folder holds `config.json`, the constructor's arguments, `model.safetensors`, the state dict, and `README.md`, the
model card. huggingface_hub is optional (`pip install 'sra2-fast[hub]'`): without it the methods say so.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..errors import InputError

try:
    from huggingface_hub import PyTorchModelHubMixin as _Mixin
except ImportError:

    class _Mixin:  # type: ignore[no-redef]
        """What stands in for the mixin where huggingface_hub is not installed."""

        def __init_subclass__(cls, **about: Any) -> None:
            super().__init_subclass__()

        def _is_missing(self: Any, *given: Any, **named: Any) -> Any:
            raise InputError(
                "SiT: from_pretrained, save_pretrained and push_to_hub need huggingface_hub; pip install it"
            )

        save_pretrained = push_to_hub = _is_missing
        from_pretrained = _from_pretrained = classmethod(_is_missing)


CARD = """---
{{ card_data }}
---

# {{ name | default("SiT trained with SRA 2", true) }}

A SiT (arXiv 2401.08740), a diffusion transformer on the latents of an autoencoder, trained with
[sra2_fast](https://arxiv.org/abs/2601.17830). Its time is sra2_fast's: t = 0 is data, t = 1 is noise, and
`model(x, t, y)` is the velocity from data to noise.

| | |
|---|---|
| blocks, width, heads, patch | {{ sizes }} |
| latents (channels, height, width) | {{ latents }} |
| classes | {{ classes }} |
| parameters without the projector | {{ parameters }} |

```python
import torch
from sra2_fast import SiT, sample_ode

model = SiT.from_pretrained("{{ repo_id | default("FOLDER_OR_NAME", true) }}").eval()
labels = torch.arange(4)
latents = sample_ode(model, torch.randn(4, {{ latents }}), labels, steps=50, method="heun")
```

## Autoencoder

{{ autoencoder | default("Which autoencoder decodes the latents; z = (value - shift) * scale of each channel.", true) }}

## Training

{{ training | default("The data, the recipe (alignment, path, batch, steps), whether weights are averaged.", true) }}

## Results

{{ results | default("Samples and figures, with the sampler, its steps, guidance, number of images.", true) }}
"""


class HubModel(
    _Mixin,
    library_name="sra2_fast",
    tags=["sit", "diffusion", "image-generation"],
    paper_url="https://arxiv.org/abs/2601.17830",
    model_card_template=CARD,
):
    """A model with `config()` that is saved to a folder or the Hub, and comes back from there.

    `save_pretrained(folder)` writes the weights as they are: averages within `with opt.swap_ema(model)`.
    `from_pretrained(folder or name)` gives the model in evaluation, on the CPU; arguments of the constructor may be
    given besides (`implementation="eager"`). Weights of another model are an error (strict=False lets them pass).
    `push_to_hub(name)` uploads the same files. `model_card_kwargs` fill the card: name, autoencoder, training, results.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        config: Any = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Write `save_directory`; returns None, or the commit's address where `push_to_hub=True` is given."""
        given = {**card_facts(self), **(model_card_kwargs or {})}
        config = dict(self.config()) if config is None else config  # type: ignore[attr-defined]
        return super().save_pretrained(save_directory, config=config, model_card_kwargs=given, **options)  # type: ignore

    def push_to_hub(
        self, repo_id: str, *, config: Any = None, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        """Upload what `save_pretrained` writes; returns the commit's address."""
        given = {"repo_id": repo_id, **(model_card_kwargs or {})}
        config = dict(self.config()) if config is None else config  # type: ignore[attr-defined]
        return super().push_to_hub(repo_id, config=config, model_card_kwargs=given, **options)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> Any:
        return super()._from_pretrained(strict=strict, **options)


def card_facts(model: Any) -> dict[str, str]:
    """What a model card says of a SiT's sizes."""
    assert isinstance(model, nn.Module)
    config: dict[str, Any] = model.config()  # type: ignore[operator]
    counted = sum(one.numel() for name, one in model.named_parameters() if not name.startswith("proj"))
    return {
        "sizes": ", ".join(str(config[name]) for name in ("depth", "hidden_size", "num_heads", "patch_size")),
        "latents": ", ".join(map(str, (config["in_channels"], *model.latent_size))),  # type: ignore[misc]
        "classes": str(config["num_classes"]),
        "parameters": f"{counted / 1e6:.1f} M",
    }
