"""`bench kernels` end to end on the CPU, and its masks against their rules written out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from attnctrl.bench import add_arguments, kernels, main
from attnctrl.bench.kernel_shapes import MASKS, Shape, entity_prompts, isolation, share_allowed, share_visited

TINY = Shape("tiny", 12, 5, 6, 2, 1, 16)


def kinds() -> torch.Tensor:
    """Of each token of TINY: -1 text, else the entity of its prompt, or of its cell of the grid of three by two."""
    cells = [y // 6 * 3 + x // 4 for y in range(12) for x in range(12)]
    return torch.tensor([-1] * 5 + [entity for entity in range(6) for _ in range(2)] + cells)


def test_isolation_lets_latents_see_their_own_cell_its_prompt_and_the_text() -> None:
    of = kinds()
    wanted = (of[:, None] == of[None, :]) | (of[None, :] == -1) | (of[:, None] == -1)
    wanted[5:17, :5] = False  # prompts see their latents and themselves
    assert torch.equal(isolation(TINY).dense()[0, 0], wanted)


def test_entity_prompts_see_their_own_box_and_no_other_prompt() -> None:
    seen = entity_prompts(TINY).dense()[0, 0]
    assert seen[:5, :5].all()
    assert seen[17:, 17:].all()
    assert seen[17:, :5].all()
    assert not seen[:5, 5:17].any()
    assert torch.equal(seen, seen.T)
    prompts = seen[5:17, 5:17]
    assert torch.equal(prompts, torch.block_diag(*[torch.ones(2, 2)] * 6).bool())


@pytest.mark.parametrize("mask", MASKS)
def test_shares_are_those_of_the_dense_mask(mask: str) -> None:
    groups = MASKS[mask](TINY)
    assert share_allowed(groups) == pytest.approx(float(groups.dense().float().mean()))
    assert share_allowed(groups) <= share_visited(groups) <= 1


def test_without_a_gpu_it_says_what_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SMALL", TINY)
    monkeypatch.setattr(kernels, "LONG", TINY)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = tmp_path / "kernels.json"
    # FlexAttention has no backward on the CPU: rows with a reason, which the exit status tells.
    assert main(parser.parse_args(["kernels", "--images", "2", "--device", "cpu", "--json", str(file)])) == 1
    text = capsys.readouterr().out
    assert "GPU figures: not measured" in text
    assert "- FlexAttention, tiny, isolation, forward + backward: " in text
    rows = json.loads(file.read_text())["rows"]
    assert {row["mask"] for row in rows} == {*MASKS, "blocks, 0.5", "blocks, 0.2"}
    assert {"sparse blocks (masked)", "sparse blocks (gather)"} <= {row["method"] for row in rows}
    assert all(row["metrics"]["to_unmasked"]["value"] > 0 for row in rows if "error" not in row)
    assert next(row for row in rows if row["method"] == kernels.GROUPS)["metrics"]["to_groups"]["value"] == 1
