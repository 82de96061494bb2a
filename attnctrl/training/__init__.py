"""Training with losses on attention: the losses, `record` for a training step, and a fine-tuning of subjects.

Importing this needs torch and diffusers; accelerate and peft are imported by whoever trains.
"""

from .concept_masks import assigned, refined
from .correspondence import coordinates, flow_field, flow_loss, reach, warped
from .losses import dice, divergence, group_shares, in_unit_range, localisation, region_mse
from .recorder import Recorder, record

__all__ = [
    "Recorder", "assigned", "coordinates", "dice", "divergence", "flow_field", "flow_loss", "group_shares",
    "in_unit_range", "localisation", "reach", "record", "refined", "region_mse", "warped",
]  # fmt: skip
