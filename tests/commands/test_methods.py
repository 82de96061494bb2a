"""attnctrl methods: the registry in print."""

from __future__ import annotations

from typing import Any

import pytest

from attnctrl.cli import main
from attnctrl.controls import REGISTRY


def test_every_method_has_its_line(capsys: Any) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(REGISTRY)
    for line, entry in zip(lines, REGISTRY.values(), strict=True):
        assert entry.control.fixes in line
        assert entry.control.paper in line


@pytest.mark.parametrize("name", REGISTRY)
def test_one_method_shows_its_parameters(name: str, capsys: Any) -> None:
    assert main(["methods", name]) == 0
    printed = capsys.readouterr().out
    for parameter, field in REGISTRY[name].params.items():
        assert f"{parameter} = {field.default!r}" in printed
        assert field.metadata["help"] in printed


def test_an_unknown_method(capsys: Any) -> None:
    assert main(["methods", "nothing"]) == 2
    assert 'method "nothing" is unknown' in capsys.readouterr().err
