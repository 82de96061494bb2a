"""The fine-tuning of subjects: what it sees, every loss, resuming, two processes, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from attnctrl.cli import main
from attnctrl.errors import ControlError
from attnctrl.models import load_pipeline
from attnctrl.shapes.budget import Stage
from attnctrl.training.learner import Learner, add_words, load_subjects
from attnctrl.training.objectives import OBJECTIVES, covered, objective_of
from attnctrl.training.recorder import record
from attnctrl.training.scenes import Scenes, caption_of, taught_subjects
from attnctrl.training.train import Recipe, train
from tests.training.material import small_model

QUICK = {"subjects": 2, "scenes": 4, "steps": 4, "batch": 2, "rank": 2, "warmup": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate lets a process have one precision only."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def files(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a training left in safetensors."""
    return {k: v for name in folder.glob("*.safetensors") for k, v in load_file(name).items()}


def test_subjects_and_their_captions() -> None:
    subjects = taught_subjects(8, seed=3)
    assert [s.word for s in subjects] == [f"<s{i}>" for i in range(8)]
    assert len({s.shape for s in subjects}) == len({s.colour for s in subjects}) == 8
    said = caption_of(list(subjects[:2]), "beige")
    assert said == f"a <s0> {subjects[0].shape} and a <s1> {subjects[1].shape} on a beige background"
    assert not any(s.colour in said for s in subjects)
    with pytest.raises(ControlError, match="3 subjects: give 2, 4, 6 or 8"):
        taught_subjects(3)


def test_batches(model: str) -> None:
    pipe = load_pipeline(model)
    subjects = taught_subjects(4)
    add_words(pipe, [s.word for s in subjects])
    scenes = Scenes(pipe, subjects, 6)
    whole, again = scenes.batch(5, 4, references=True), scenes.batch(5, 4, references=True)
    assert all(torch.equal(getattr(whole, f), getattr(again, f)) for f in ("clean", "noise", "ids", "masks"))
    assert whole.clean.shape == whole.noise.shape == (12, 4, 16, 16)
    assert whole.scenes == 4
    # Each process has its rows, and with them those of its references.
    for rank in range(2):
        part = scenes.batch(5, 4, rank, 2, references=True)
        assert torch.equal(part.clean[:2], whole.clean[:4][rank::2])
        assert torch.equal(part.noise[2:], whole.noise[4:].unflatten(0, (4, 2))[rank::2].flatten(0, 1))
        assert torch.equal(part.masks, whole.masks[rank::2])
    assert scenes.batch(5, 4).clean.shape == (4, 4, 16, 16)
    # The marked tokens are those of the subject's word and shape, and of the background's words.
    tokens = [pipe.tokenizer.convert_ids_to_tokens(row) for row in whole.ids.tolist()]
    for row, words, ground in zip(tokens, whole.words, whole.ground, strict=False):
        for one in words:
            word, shape = (row[i].removesuffix("</w>") for i in one.nonzero().flatten())
            assert (word, shape) in {(s.word, s.shape) for s in subjects}
        said = [row[i].removesuffix("</w>") for i in ground[0].nonzero().flatten()]
        assert (said[0], said[-1], len(said)) == ("a", "background", 3)
    # A mask covers its subject in the picture: there, and not elsewhere, is its colour.
    subject = {s.word: s for s in subjects}
    for i in range(whole.scenes):
        for k in range(2):
            word = next(tokens[i][j] for j in whole.words[i, k].nonzero().flatten() if tokens[i][j] in subject)
            inside = whole.masks[i, k] > 0.99
            shown = whole.pictures[i][:, inside].mean(1)
            view = whole.references[i, k][:, whole.reference_masks[i, k] > 0.99].mean(1)
            assert torch.allclose(shown, view, atol=0.05)
    # Alike, the two of a scene have one shape; the words, and the colours, are still each their own.
    twins = Scenes(pipe, subjects, 6, alike=True).batch(0, 6)
    for row, words in zip(twins.ids, twins.words, strict=True):
        (first, shape), (second, other) = (row[one].tolist() for one in words)
        assert shape == other
        assert first != second
    assert torch.allclose(covered(whole.masks, (1, 4, 4)).mean(-1), whole.masks.mean((-1, -2)), atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_loss_reaches_the_lora_or_the_words(model: str, name: str) -> None:
    """Alone, its gradient moves what is learned, and nothing else."""
    torch.manual_seed(0)
    pipe = load_pipeline(model)
    subjects = taught_subjects(2)
    learner = Learner(pipe, [s.word for s in subjects], 2)
    objective = objective_of(name)
    assert objective is not None
    batch = Scenes(pipe, subjects, 4).batch(0, 2, references=objective.references)
    # What an untrained model sees of a reference is its middle, where pictures of this world are flat.
    batch = replace(batch, references=torch.rand(batch.references.shape))
    with record(learner.unet, objective.where) as recorded:
        learner(batch.clean + batch.noise, batch.timesteps, batch.ids)
        values = objective.loss(recorded.maps, batch)
    assert values.shape == (2,)
    assert torch.isfinite(values).all()
    values.sum().backward()
    moved = {n for n, p in learner.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    assert moved
    assert all("lora_" in n or n == "words" for n in moved)


def test_none_and_weight_zero_are_the_same_training(model: str, tmp_path: Path) -> None:
    train(Recipe(**QUICK), tmp_path / "none", model=model, cpu=True)
    train(Recipe(**QUICK, loss="localisation", weight=0.0), tmp_path / "zero", model=model, cpu=True)
    train(Recipe(**QUICK, loss="localisation", weight=5.0), tmp_path / "five", model=model, cpu=True)
    none, zero, five = (files(tmp_path / name) for name in ("none", "zero", "five"))
    assert none.keys() == zero.keys()
    assert all(torch.equal(none[n], zero[n]) for n in none)
    assert any(not torch.allclose(none[n], five[n], atol=1e-4) for n in none)


def test_accumulation_is_a_larger_batch(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backward passes of the same scenes move as one of them does."""
    same = Scenes.batch
    monkeypatch.setattr(Scenes, "batch", lambda self, number, *given: same(self, 0, *given))
    train(Recipe(**{**QUICK, "steps": 2}), tmp_path / "once", model=model, cpu=True)
    train(Recipe(**{**QUICK, "steps": 2, "accumulate": 2}), tmp_path / "twice", model=model, cpu=True)
    once, twice = files(tmp_path / "once"), files(tmp_path / "twice")
    assert all(torch.allclose(once[n], twice[n], atol=1e-5) for n in once)


def test_a_resumed_training_repeats_an_uninterrupted_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**QUICK, loss="facial")
    train(recipe, tmp_path / "whole", model=model, cpu=True)
    advance = Stage.advance

    def stop_after_two(self: Stage) -> None:
        advance(self)
        if self.step == 2:
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "advance", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "halves", model=model, cpu=True)
    monkeypatch.setattr(Stage, "advance", advance)
    train(recipe, tmp_path / "halves", model=model, cpu=True, resume=True)
    whole, halves = files(tmp_path / "whole"), files(tmp_path / "halves")
    assert all(torch.allclose(whole[n], halves[n], atol=1e-6) for n in whole)


def test_the_stock_pipeline_loads_what_was_learned(model: str, tmp_path: Path) -> None:
    pipe, subjects = train(Recipe(**QUICK, loss="region-mse"), tmp_path, model=model, mixed_precision="bf16", cpu=True)
    about = json.loads((tmp_path / "subjects.json").read_text())
    assert [s["word"] for s in about["subjects"]] == [s.word for s in subjects] == ["<s0>", "<s1>"]
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}

    def draw(one: Any) -> torch.Tensor:
        one.set_progress_bar_config(disable=True)
        prompt = caption_of(list(subjects), "white")
        drawn: torch.Tensor = one(prompt, generator=torch.Generator().manual_seed(0), **call).images
        return drawn

    fresh = load_pipeline(model)
    with pytest.raises(ControlError, match=r"has no pytorch_lora_weights\.safetensors"):
        load_subjects(fresh, tmp_path / "nowhere")
    assert load_subjects(fresh, tmp_path) == ["<s0>", "<s1>"]
    assert torch.allclose(draw(fresh), draw(pipe), atol=1e-5)
    fresh.disable_lora()
    assert not torch.allclose(draw(fresh), draw(pipe), atol=1e-5)


def test_what_cannot_be_trained_says_why(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train-subjects", "--out", str(tmp_path), "--loss", "magic"]) == 2
    assert 'the loss "magic" is not known: choose one of none, localisation' in capsys.readouterr().err
    assert main(["train-subjects", "--out", str(tmp_path), "--batch", "0"]) == 2
    assert "--batch 0: give 1 or more" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "num_processes", property(lambda self: 4))
        with pytest.raises(ControlError, match="a batch of 2 scenes cannot be shared by 4 processes"):
            train(Recipe(**QUICK), tmp_path, model=model, cpu=True)
    pipe = load_pipeline(model)
    with pytest.raises(ControlError, match='knows the word "circle</w>" already'):
        add_words(pipe, ["circle</w>"])
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ControlError, match="StableDiffusionPipeline cannot be fine-tuned by this"):
        Learner(pipe, ["<s0>"], 2)


def _member(recipe: Recipe, out: Path, model: str) -> None:
    train(recipe, out, model=model, cpu=True)


@pytest.mark.slow
def test_two_processes_train_as_one(model: str, tmp_path: Path) -> None:
    """Two CPU processes under gloo, each with half of every batch, end with the weights of one process."""
    recipe = Recipe(**{**QUICK, "batch": 4, "steps": 3}, loss="localisation", weight=1.0)
    debug_launcher(_member, (recipe, tmp_path / "two", model), num_processes=2)
    train(recipe, tmp_path / "one", model=model, cpu=True)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n], two[n], atol=1e-4) for n in one)
    torch.manual_seed(0)
    start = Learner(load_pipeline(model), ["<s0>", "<s1>"], 2).words
    assert not torch.allclose(one["<s0>"], start[0].detach(), atol=1e-3)
