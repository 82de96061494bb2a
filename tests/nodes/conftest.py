"""A prompt of the stand-in for ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest

from attnctrl.nodes import native
from tests.nodes import host
from tests.nodes.helpers import PROMPT


@pytest.fixture
def clip() -> host.Clip:
    return host.Clip()


@pytest.fixture
def words(clip: host.Clip) -> Any:
    return native.prompt_with_words(clip, PROMPT)[1]


@pytest.fixture
def positive(words: Any) -> Any:
    return words.conditioning


@pytest.fixture
def negative(clip: host.Clip) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize("nothing at all"))
