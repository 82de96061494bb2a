"""A task end to end on any supported base pipeline."""

from attnctrl.pipelines.editing import EditPipeline, EditResult
from attnctrl.pipelines.instruct import InstructPipeline, InstructResult
from attnctrl.pipelines.layout import LayoutPipeline, LayoutResult
from attnctrl.pipelines.paro import calibrate_paro
from attnctrl.pipelines.plan_sparse import plan_sparse
from attnctrl.pipelines.readout import ReadoutPipeline
from attnctrl.pipelines.subjects import SubjectsPipeline, SubjectsResult

__all__ = [
    "EditPipeline",
    "EditResult",
    "InstructPipeline",
    "InstructResult",
    "LayoutPipeline",
    "LayoutResult",
    "ReadoutPipeline",
    "SubjectsPipeline",
    "SubjectsResult",
    "calibrate_paro",
    "plan_sparse",
]
