"""A task end to end on any supported base pipeline."""

from attnctrl.pipelines.layout import LayoutPipeline, LayoutResult

__all__ = ["LayoutPipeline", "LayoutResult"]
