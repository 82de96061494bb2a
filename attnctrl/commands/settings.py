"""What several commands read alike: name=value, and the guidance scale."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from attnctrl.errors import ControlError
from attnctrl.models import SHIPPED

SHAPES_GUIDANCE = 3.5


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


def guidance_of(args: argparse.Namespace) -> float | None:
    """The scale that --guidance asks for; without it that of the shapes models, and None, their own, for others."""
    shipped = args.guidance is None and args.model.startswith(SHIPPED)
    return SHAPES_GUIDANCE if shipped else args.guidance
