import argparse

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from attnctrl.errors import ControlError
from attnctrl.processors.packing import blocks_of_pictures
from attnctrl.shapes import models, pretrained
from attnctrl.shapes.budget import Budget, learning_rate
from attnctrl.shapes.crew import SOLO, Crew, run_crew
from attnctrl.shapes.ema import Average
from attnctrl.shapes.muon import Muon, orthogonalised
from attnctrl.shapes.pretrained import assemble
from attnctrl.shapes.train import add_arguments, budgets, main, text_encoder
from attnctrl.shapes.train_autoencoder import AutoencoderRecipe, refine_decoder, train_autoencoder
from attnctrl.shapes.train_denoiser import DenoiserRecipe, encode_world, train_denoiser
from attnctrl.shapes.train_entities import EntityRecipe, train_entities
from attnctrl.shapes.train_flow import Velocity
from attnctrl.shapes.train_text import TextRecipe, train_text_encoder
from attnctrl.shapes.train_transformer import TransformerRecipe, train_transformer
from tests import dit
from tests.interrupted import check_resumed

IMAGES = AutoencoderRecipe(images=1, full_from=0.5)
LATENTS = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()


def autoencoder(out, resume):
    return train_autoencoder(out, Budget(steps=4), IMAGES, resume=resume)


def decoder(out, resume):
    torch.manual_seed(3)
    return refine_decoder(models.autoencoder(), out, Budget(steps=4), IMAGES, resume=resume)


def text(out, resume):
    return train_text_encoder(out, Budget(steps=4), TextRecipe(batch=4), resume=resume)


def denoiser(out, resume):
    torch.manual_seed(3)
    recipe = DenoiserRecipe(batch=2, warmup=1)
    unet, _ = train_denoiser(text_encoder(), LATENTS, out, Budget(steps=4), recipe, resume=resume)
    return unet


def transformer(out, resume):
    torch.manual_seed(3)
    recipe = TransformerRecipe(batch=2, warmup=1)
    return train_transformer(text_encoder(), LATENTS, out, Budget(steps=4), recipe, resume=resume)


def entities(out, resume):
    recipe = EntityRecipe(batch=2, warmup=1, rank=2)
    return train_entities(dit.transformer(), text_encoder(), LATENTS, out, Budget(steps=4), recipe, resume=resume)


@pytest.mark.parametrize("stage", [autoencoder, decoder, text, denoiser, transformer, entities])
def test_resumed_equals_uninterrupted(stage, tmp_path, monkeypatch):
    check_resumed(stage, tmp_path, monkeypatch)


def test_the_whole_command(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = f"sd --out {tmp_path} --steps 2 2 2 2 --scenes 4 --batch 2 --device cpu --processes 1"
    assert main(parser.parse_args(line.split())) == 0
    assert "after decoder refinement" in capsys.readouterr().out
    assert (tmp_path / "pipeline" / "model_index.json").exists()
    assert not list((tmp_path / "pipeline").rglob("*.bin"))
    before = (tmp_path / "denoiser.pt").stat().st_size
    assert main(parser.parse_args([*line.split(), "--resume"])) == 0
    assert (tmp_path / "denoiser.pt").stat().st_size == before


def test_the_whole_command_for_the_transformer(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = f"dit --out {tmp_path} --steps 2 --scenes 4 --batch 2 --device cpu --processes 1"
    assert main(parser.parse_args(line.split())) == 0
    path = tmp_path / "pipeline"
    assert (path / "model_index.json").exists()
    model = FluxTransformer2DModel.from_pretrained(path / "transformer")
    pipeline = assemble(model, FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"))
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red circle"], num_inference_steps=2, max_sequence_length=32, output_type="np").images
    assert images.shape == (1, 128, 128, 3)


def test_the_whole_command_for_the_entities(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    weights = dit.write(tmp_path / "weights")
    line = f"entities --out {tmp_path / 'out'} --steps 2 --scenes 4 --batch 2 --device cpu --processes 1 --base "
    assert main(parser.parse_args([*line.split(), str(weights / "dit")])) == 0
    lora = tmp_path / "out" / "lora" / pretrained.LORA
    pipeline = assemble(dit.transformer(), models.flow_scheduler())
    before = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    assert pipeline.get_list_adapters() == {"transformer": ["default_0"]}
    base = {n.replace(".base_layer", ""): p for n, p in pipeline.transformer.named_parameters() if "lora" not in n}
    assert all(torch.equal(base[name], value) for name, value in before.items())
    learned = [p for n, p in pipeline.transformer.named_parameters() if "lora_B" in n]
    assert all(p.any() for p in learned)
    with pytest.raises(ControlError, match="holds no transformer: give the folder of a dit pipeline"):
        main(parser.parse_args([*line.split(), str(tmp_path)]))
    monkeypatch.setattr(pretrained, "_WEIGHTS", tmp_path / "nothing")
    with pytest.raises(ControlError, match="unknown shapes model 'dit'; known: none"):
        main(parser.parse_args(line.split()[:-1]))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ControlError, match="train-shapes entities needs peft"):
        main(parser.parse_args([*line.split(), str(weights / "dit")]))


def test_an_untrained_transformer_is_the_identity_with_closed_gates():
    """Its blocks add nothing and its output is zero, but gradients reach the output projection."""
    velocity = Velocity(models.transformer(), text_encoder())
    predicted = velocity(torch.randn(1, 4, 16, 16), torch.tensor([0.5]), torch.zeros(1, 32, dtype=torch.long))
    assert not predicted.any()
    (predicted - 1).square().mean().backward()
    assert velocity.transformer.proj_out.weight.grad.any()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_torchs_up_to_its_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    both = Muon([ours], lr=1e-2), torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimiser in both:
            optimiser.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_packing_is_that_of_the_pipeline():
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blocks_of_pictures(latents), FluxPipeline._pack_latents(latents, 2, 4, 16, 16))


def test_encoding_whitens_and_folds(tmp_path):
    torch.manual_seed(0)
    vae = models.autoencoder().eval()
    latents = encode_world(vae, tmp_path, 8).float()
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-2
    saved = type(vae).from_pretrained(tmp_path / "vae")
    assert torch.equal(saved.encoder.layers[0].weight, vae.encoder.layers[0].weight)


def test_fold_whitening_is_exact_for_the_encoder():
    torch.manual_seed(0)
    vae = models.autoencoder()
    image = torch.rand(1, 3, 64, 64)
    mean, std = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([0.3, 2.0, 1.0, 1.3])
    with torch.no_grad():
        before = vae.encode(image).latents
        models.fold_whitening(vae, mean, std)
        after = vae.encode(image).latents
    assert torch.allclose(after, (before - mean[:, None, None]) / std[:, None, None], atol=1e-4)


def test_fast_decode_equals_decode_inside():
    torch.manual_seed(0)
    decoder_ = models.autoencoder().decoder
    z = torch.randn(2, 4, 6, 6)
    difference = (decoder_(z) - models.fast_decode(decoder_, z)).abs()
    assert difference[..., 1:-1, 1:-1].max() < 1e-4
    assert difference.max() > 1e-3


def test_average_follows_and_survives_a_checkpoint():
    layer = torch.nn.Linear(2, 2)
    average = Average({"layer": layer}, decay=0.5)
    start = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    average.update()  # the first update weighs the new weights by 1 - 2/11
    assert torch.allclose(average.average["layer"]["weight"], start + 9 / 11)
    other = Average({"layer": torch.nn.Linear(2, 2)}, decay=0.5)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.average["layer"]["weight"], average.average["layer"]["weight"])
    assert other.updates == 1


def test_budgets():
    assert budgets("sd", [100.0], None)["denoiser"] == Budget(minutes=71.0)
    assert budgets("sd", [1.0, 2.0, 3.0, 4.0], None)["decoder"] == Budget(minutes=4.0)
    assert budgets("sd", [9.0], [1, 2, 3, 4])["text"] == Budget(steps=2)
    assert budgets("entities", [9.0], [7]) == {"entities": Budget(steps=7)}
    assert budgets("dit", [9.0], None) == {"transformer": Budget(minutes=9.0)}
    assert budgets("video", [100.0], None)["transformer"] == Budget(minutes=83.0)
    with pytest.raises(ValueError, match=r"sd has 4 stages .* but 2 numbers"):
        budgets("sd", [1.0, 2.0], None)
    with pytest.raises(ValueError, match="0 steps were given: give 1 or more"):
        budgets("dit", [9.0], [0])
    with pytest.raises(ValueError, match="-1 minutes were given"):
        budgets("dit", [-1.0], None)
    with pytest.raises(ValueError, match="either steps or minutes"):
        Budget(steps=1, minutes=1.0)


def test_learning_rate():
    assert learning_rate(1.0, 0.0, 0, warmup=10) == pytest.approx(0.1)
    assert learning_rate(1.0, 0.3, 100, warmup=10, flat=0.3) == pytest.approx(1.0)
    assert learning_rate(1.0, 0.65, 100, warmup=10, flat=0.3) == pytest.approx(0.5)
    assert learning_rate(1.0, 1.0, 100, warmup=10, flat=0.3) == pytest.approx(0.0)


def _average_gradient(crew, path):
    model = crew.wrap(torch.nn.Linear(1, 1, bias=False))
    model(crew.share(torch.tensor([[1.0], [3.0]]))).sum().backward()
    agreed = crew.agree(float(crew.rank))
    if crew.rank == 0:
        torch.save((next(model.parameters()).grad, agreed), path)


def test_a_crew_averages_gradients(tmp_path):
    run_crew(2, _average_gradient, (tmp_path / "result",), tmp_path / "meeting")
    gradient, agreed = torch.load(tmp_path / "result", weights_only=True)
    assert gradient.item() == pytest.approx(2.0)
    assert agreed == 1.0


def test_alone_is_a_crew_of_one():
    batch = torch.arange(4)
    assert SOLO.share(batch).equal(batch)
    assert Crew(1, 2).share(batch).tolist() == [1, 3]
    assert SOLO.agree(3.0) == 3.0
