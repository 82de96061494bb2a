"""A task end to end on any supported base pipeline."""

from attnctrl.pipelines.layout import LayoutPipeline, LayoutResult
from attnctrl.pipelines.paro import calibrate_paro

__all__ = ["LayoutPipeline", "LayoutResult", "calibrate_paro"]
