"""What nodes have asked of one MODEL, and how it stays on ComfyUI's ModelPatcher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from attnctrl.control import Control
from attnctrl.errors import ControlError
from attnctrl.maps import Maps
from attnctrl.nodes.places import Placed
from attnctrl.nodes.words import Words
from attnctrl.run import check_together

KEY = "attnctrl"
APPLY, OUTER = "apply_model", "outer_sample"
"""ComfyUI's names of the wrapped functions, WrappersMP.APPLY_MODEL and OUTER_SAMPLE."""


@dataclass(eq=False)
class Recorded:
    """The maps of the last sampling with a patched model."""

    maps: Maps | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """One control with its regions and the prompt in which their words stand."""

    control: Control
    placed: Placed | None = None
    words: Words | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The controls of a model in the order of the nodes, and which phrases are recorded, for whom."""

    asked: tuple[Asked, ...] = ()
    phrases: tuple[str, ...] = ()
    recorded: tuple[Recorded, ...] = ()
    words: Words | None = field(default=None)

    def also(self, one: Asked) -> Plan:
        """The plan with one more control. Raises ControlError for two that cannot work together, and two prompts."""
        check_together([*(asked.control for asked in self.asked), one.control])
        return replace(self._of(one.words), asked=(*self.asked, one))

    def recording(self, phrases: tuple[str, ...], words: Words, into: Recorded) -> Plan:
        """The plan with maps of further phrases. Raises ControlError for one that is not in the prompt."""
        for phrase in phrases:
            words.tokens.find(phrase)
        every = tuple(dict.fromkeys([*self.phrases, *phrases]))
        return replace(self._of(words), phrases=every, recorded=(*self.recorded, into))

    def _of(self, words: Words | None) -> Plan:
        if words is not None and self.words is not None and words.text != self.words.text:
            raise ControlError(
                f'one node reads the prompt "{self.words.text}" and another "{words.text}": connect the words of '
                "the one prompt that the sampler gets."
            )
        return self if words is None else replace(self, words=words)


def plan_of(model: Any) -> Plan:
    """The plan on a ModelPatcher; an empty one where there is none."""
    found = model.get_wrappers(APPLY, KEY)
    plan: Plan = found[0].__self__.plan if found else Plan()
    return plan


def patched(model: Any, plan: Plan) -> Any:
    """A clone of a ModelPatcher under a plan, in place of the one it had. The given one stays as it is."""
    from attnctrl.nodes.runs import Run

    clone, run = model.clone(), Run(plan)
    for name, wrapper in ((APPLY, run.apply_model), (OUTER, run.outer_sample)):
        clone.remove_wrappers_with_key(name, KEY)
        clone.add_wrapper_with_key(name, KEY, wrapper)
    return clone
