"""A task end to end on any supported base pipeline."""

from attnctrl.pipelines.editing import EditPipeline, EditResult
from attnctrl.pipelines.layout import LayoutPipeline, LayoutResult

__all__ = ["EditPipeline", "EditResult", "LayoutPipeline", "LayoutResult"]
