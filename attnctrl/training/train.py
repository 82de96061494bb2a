"""Fine-tune words and a LoRA for subjects of the shapes world, with or without a loss on attention.

`attnctrl train-subjects`, or for several processes `accelerate launch -m attnctrl.training.train`.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from attnctrl.errors import ControlError
from attnctrl.models import load_pipeline
from attnctrl.shapes.budget import Budget, Stage, learning_rate
from attnctrl.shapes.crew import Crew
from attnctrl.training.learner import Learner
from attnctrl.training.objectives import OBJECTIVES, objective_of
from attnctrl.training.recorder import record
from attnctrl.training.scenes import Scenes, Taught, taught_subjects

CHECKPOINT = "checkpoint.pt"
SUBJECTS = "subjects.json"


@dataclass(frozen=True)
class Recipe:
    """Settings of a fine-tuning.

    loss: a name of `objectives.OBJECTIVES`, or "none"; weight: its factor, None for the objective's own. subjects: 2,
    4, 6 or 8, two to a scene; scenes: how many are rendered; alike: whether the two of a scene have one shape. batch:
    scenes of one backward pass, over all processes; accumulate: backward passes of one step. word_rate, lora_rate:
    learning rates of Adam, which rise over `warmup` steps and fall to 0 by a half cosine. rank: of the LoRA.
    """

    loss: str = "none"
    weight: float | None = None
    subjects: int = 8
    scenes: int = 64
    alike: bool = False
    steps: int = 300
    batch: int = 8
    accumulate: int = 1
    word_rate: float = 3e-3
    lora_rate: float = 1e-3
    warmup: int = 10
    rank: int = 4
    seed: int = 0


def train(
    recipe: Recipe,
    out: Path,
    *,
    model: str = "shapes-sd",
    mixed_precision: str | None = None,
    cpu: bool = False,
    resume: bool = False,
) -> tuple[Any, tuple[Taught, ...]]:
    """Fine-tune; the pipeline with what it learned, and its subjects.

    In `out` are then the LoRA and the words (`learner.load_subjects`), what the words stand for, and the checkpoint
    that `resume` continues from: a resumed training repeats an uninterrupted one. Minimised is mean((predicted -
    noise)^2) plus the weighted loss on the maps. Started by `accelerate launch`, every process calls this alike.
    mixed_precision: "no", "bf16" or "fp16"; None for what accelerate was launched with. Raises ControlError for recipes
    that cannot be, and for models other than Stable Diffusion.
    """
    objective = objective_of(recipe.loss)
    accelerator = Accelerator(gradient_accumulation_steps=recipe.accumulate, mixed_precision=mixed_precision, cpu=cpu)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    if recipe.batch % ranks:
        raise ControlError(f"a batch of {recipe.batch} scenes cannot be shared by {ranks} processes: give a multiple.")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    pipe = load_pipeline(model, device=accelerator.device, dtype=torch.float32)
    subjects = taught_subjects(recipe.subjects, recipe.seed)
    learner = Learner(pipe, [subject.word for subject in subjects], recipe.rank)
    scenes = Scenes(pipe, subjects, recipe.scenes, recipe.seed, recipe.alike)
    rates = (recipe.lora_rate, recipe.word_rate)
    groups: list[dict[str, Any]] = [
        {"params": learner.lora(), "lr": rates[0]},
        {"params": [learner.words], "lr": rates[1]},
    ]
    optimiser: Any = torch.optim.AdamW(groups, weight_decay=0.0)
    model_, optimiser = accelerator.prepare(learner.train(), optimiser)
    state = {"trained": learner.trained(), "optimiser": optimiser}
    crew = Crew(rank, ranks)
    stage = Stage(out / CHECKPOINT, Budget(steps=recipe.steps), state, crew)
    if resume:
        stage.resume()
    kept = pipe.scheduler.alphas_cumprod.to(accelerator.device)
    weight = 0.0 if objective is None else objective.weight if recipe.weight is None else recipe.weight
    references = objective is not None and objective.references
    bar = stage.bar(recipe.loss)
    stage.start_clock()
    with ExitStack() as stack:
        recorded = None if objective is None else stack.enter_context(record(learner.unet, objective.where))
        while stage.progress < 1:
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = learning_rate(rate, stage.progress, stage.step, recipe.warmup)
            for part in range(recipe.accumulate):
                number = stage.step * recipe.accumulate + part
                batch = scenes.batch(number, recipe.batch, rank, ranks, references).to(accelerator.device)
                share = kept[batch.timesteps].view(-1, 1, 1, 1)
                noisy = share.sqrt() * batch.clean + (1 - share).sqrt() * batch.noise
                with accelerator.accumulate(model_):
                    predicted = model_(noisy, batch.timesteps, batch.ids)
                    # The rows of references are there to be looked at.
                    error = (predicted.float() - batch.noise)[: batch.scenes].square().mean()
                    shown = {"error": float(error.detach())}
                    loss = error
                    if objective is not None and recorded is not None:
                        attention = objective.loss(recorded.maps, batch).mean()
                        loss = loss + weight * attention
                        shown["attention"] = float(attention.detach())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_([p for g in groups for p in g["params"]], 1.0)
                    optimiser.step()
                    optimiser.zero_grad()
            stage.advance()
            bar.set_postfix(step=stage.step, **{k: f"{v:.4f}" for k, v in shown.items()}, refresh=False)
            bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
    learner.eval().settle()
    if accelerator.is_main_process:
        learner.save(out)
        about = {"recipe": asdict(recipe), "subjects": [asdict(subject) for subject in subjects]}
        (out / SUBJECTS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    return pipe, subjects


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `attnctrl train-subjects`."""
    base = Recipe()
    parser.add_argument("--out", type=Path, required=True, help="for the LoRA, the words and the checkpoint")
    parser.add_argument("--loss", default=base.loss, help=f"on attention: none, {', '.join(OBJECTIVES)}")
    parser.add_argument("--weight", type=float, help="of that loss beside the denoising loss; default: its own")
    parser.add_argument("--subjects", type=int, default=base.subjects, help="2, 4, 6 or 8, two to a scene")
    parser.add_argument("--scenes", type=int, default=base.scenes, help="how many are rendered (default %(default)s)")
    parser.add_argument(
        "--alike", action="store_true", help="one shape for the two of a scene: only masks tell which word is whose"
    )
    parser.add_argument("--steps", type=int, default=base.steps, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=base.batch, help="scenes of a backward pass, over all processes")
    parser.add_argument("--accumulate", type=int, default=base.accumulate, help="backward passes of a step")
    parser.add_argument("--word-rate", type=float, default=base.word_rate, help="learning rate of the words")
    parser.add_argument("--lora-rate", type=float, default=base.lora_rate, help="learning rate of the LoRA")
    parser.add_argument("--rank", type=int, default=base.rank, help="of the LoRA (default %(default)s)")
    parser.add_argument("--seed", type=int, default=base.seed)
    parser.add_argument("--model", default="shapes-sd", help="shapes-sd, a folder or a hub id of Stable Diffusion")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="default: accelerate's own")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in OUT")


def main(args: argparse.Namespace) -> int:
    """Train as the arguments say; 0 on success. Raises ControlError for bad input."""
    for name in ("scenes", "steps", "batch", "accumulate", "rank"):
        if getattr(args, name) < 1:
            raise ControlError(f"--{name} {getattr(args, name)}: give 1 or more.")
    names = Recipe.__dataclass_fields__.keys() & vars(args).keys()
    recipe = Recipe(**{name: getattr(args, name) for name in names})
    train(recipe, args.out, model=args.model, mixed_precision=args.mixed_precision, cpu=args.cpu, resume=args.resume)
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    try:
        raise SystemExit(main(_parser.parse_args()))
    except ControlError as error:
        _parser.exit(2, f"train-subjects: {error}\n")
