"""torch.compile for a SiT, block by block."""

from __future__ import annotations

from .sit import SiT


def compile_blocks(model: SiT) -> SiT:
    """torch.compile block by block, in place: depth 28 compiles no more graphs than depth 4, and fusion across blocks
    stays. The projector is left as it is, since its last layer is read by the loss's own kernel."""
    for layer in (*model.blocks, model.final_layer):
        layer.compile()
    return model
