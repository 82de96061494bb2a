"""What users write as name=value."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from attnctrl.errors import ControlError


def parse_settings(texts: Sequence[str], option: str) -> dict[str, Any]:
    """ "name=value" each, a value read as a Python literal where it is one. Raises ControlError without an "="."""
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ControlError(f'{option} "{text}": write name=value.')
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings
