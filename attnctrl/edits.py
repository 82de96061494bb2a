"""`Edit`: words of a prompt and what takes their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnctrl.errors import ControlError
from attnctrl.prompt import whole_words


@dataclass(frozen=True, eq=False)
class Edit:
    """Words of the source prompt and what takes their place; mask: where, of any kind that `Region` takes."""

    source: str
    target: str
    mask: Any = None


def edited(prompt: str, edits: Sequence[Edit]) -> str:
    """The prompt with the words of every edit replaced, all at once.

    Raises ControlError when there are no edits, or an edit's words are not in the prompt or overlap another's.
    """
    if not edits:
        raise ControlError("there is nothing to edit: give target_prompt, or edits=[Edit(words, other words)].")
    found = []
    for edit in edits:
        places = [m.span() for m in whole_words(prompt, edit.source)]
        if not places:
            raise ControlError(f'the words "{edit.source}" are not in the source prompt "{prompt}".')
        found += [(start, end, edit.target) for start, end in places]
    text, done = "", 0
    for start, end, target in sorted(found):
        if start < done:
            raise ControlError(f'two edits change the same words of "{prompt}": "{prompt[start:end]}".')
        text, done = text + prompt[done:start] + target, end
    return text + prompt[done:]
