"""Loading a pipeline by name: the shipped models, a folder, or a hub id."""

from __future__ import annotations

from typing import Any

import torch

SHIPPED = "shapes-"


def load_pipeline(model: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """A text-to-image pipeline.

    model: "shapes-sd" for a shipped model, else what diffusers' `from_pretrained` takes (safetensors only).
    device: default CUDA where there is one, else CPU. dtype: default float16 on CUDA, float32 elsewhere.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float16 if device.startswith("cuda") else torch.float32)
    if model.startswith(SHIPPED):
        from attnctrl import shapes

        return shapes.load(model.removeprefix(SHIPPED), dtype=dtype, device=device)
    from diffusers import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pretrained(model, dtype=dtype, use_safetensors=True)
    return pipe.to(device)
