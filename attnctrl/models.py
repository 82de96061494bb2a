"""Loading a pipeline by name: the shipped models, a folder, or a hub id."""

from __future__ import annotations

from typing import Any

import torch

from attnctrl.errors import ControlError

SHIPPED = "shapes-"


def load_pipeline(model: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """A text-to-image pipeline.

    model: "shapes-sd" for a shipped model, else what diffusers' `from_pretrained` takes (safetensors only).
    device: default CUDA where there is one, else CPU. dtype: default float16 on CUDA, float32 elsewhere.
    Raises ControlError when there is no shipped model of that name.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if model.startswith(SHIPPED):
        from attnctrl import shapes

        try:
            return shapes.load(model.removeprefix(SHIPPED), dtype=dtype, device=device)
        except ValueError as error:
            raise ControlError(f"{error}.") from None
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, use_safetensors=True).to(device, dtype)
