"""A prompt and pictures of its subjects in, pictures of these subjects out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from attnctrl.control import Control
from attnctrl.controls import REGISTRY
from attnctrl.controls.subjects.draw_references import DrawReferences
from attnctrl.controls.subjects.rows import reference_prompts
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.inversion import Job, ddim_trajectory, use_ddim
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.pipelines.methods import Methods, make_controls
from attnctrl.references import Subject
from attnctrl.run import Run, control
from attnctrl.words import words_for

ROWLESS = tuple(
    entry.control
    for entry in REGISTRY.values()
    if entry.task in ("layout", "guidance") or not getattr(entry.control, "needs_rows", True)
)
"""Methods that do not look at rows of references."""
WORDED = ("delayed-subject", "persona-hoi")
"""The methods that want an embedding for every subject."""
NOISES = ("one", "fresh", "inversion")
REFERENCE_SEED = 2**31
"""Added to the seed for the noise of references: with the pictures' own noise they would give their layout away too."""


def needs_rows(controls: Sequence[Control]) -> bool:
    """Whether the run needs rows for the references: for every method but those known to do without."""
    return not all(isinstance(one, ROWLESS) for one in controls)


@dataclass(frozen=True)
class SubjectsResult:
    """images: the pictures, prompt by prompt. references: what the run made of each reference, none where no method
    looks at them. run: see `Run`. words: by the phrase of a subject the word that was found for it, "" for none."""

    images: list[Image.Image]
    references: list[Image.Image]
    run: Run
    words: dict[str, str]

    @property
    def report(self) -> str:
        """The run's report, and below it the words that were found."""
        found = [
            f'{phrase}: found "{word}"' if word else f"{phrase}: no word fits better than none"
            for phrase, word in self.words.items()
        ]
        return "\n".join([str(self.run.report), *found])


class SubjectsPipeline:
    """Draws given subjects, one or several in a picture, on any supported text-to-image pipeline.

        draw = SubjectsPipeline.from_pretrained("shapes-sd")
        subjects = [Subject("a circle", picture, mask), Subject("a square", other, other_mask)]
        result = draw("a circle and a square on a white background", subjects)
        result.images[0]; print(result.run.report)

    The base pipeline stays `draw.pipe` and keeps its scheduler.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> SubjectsPipeline:
        """model: "shapes-sd", "shapes-dit", a folder, a hub id; device, dtype: see `attnctrl.models.load_pipeline`."""
        return cls(load_pipeline(model, **kwargs))

    @property
    def methods(self) -> list[str]:
        """The registered methods for subjects."""
        return [m.name for m in REGISTRY.values() if m.task == "subjects"]

    def __call__(
        self,
        prompt: str | Sequence[str],
        subjects: Sequence[Subject],
        *,
        method: Methods = "magic-face",
        words: str = "learned",
        among: Sequence[str] | None = None,
        reference_noise: str = "one",
        noise_scale: float = 1.0,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        guidance: float | None = None,
        seed: int = 0,
        record: bool | Sequence[str] = True,
        **kwargs: Any,
    ) -> SubjectsResult:
        """Draw `prompt`, or each of several, with these subjects.

        method: a name from the registry, a control, several of them, names with the parameters of each, or "none".
        Methods for layout may be among them: they put the subjects that have a region there. "delayed-subject" and
        "persona-hoi" by name want a word for each subject first: words says whether it is "learned" or, without
        gradients, "found" among the model's own or those of `among`, see `attnctrl.words`. The latter method wants the
        prompt twice and the subjects' regions. reference_noise: how references are noised along the run, "one" noise, a
        "fresh" one in every step, or by DDIM "inversion" (noise-predicting UNets); noise_scale: how much they have of
        it, see `DrawReferences`. A subject of strength 0 takes no part. seed: of the first picture's noise, counted up
        for each further one of a prompt. kwargs: arguments of the base pipeline, and parameters of the method.
        Raises ControlError for unknown names and parameters and for subjects that cannot be used.
        """
        if reference_noise not in NOISES:
            raise ControlError(f'reference_noise is "{reference_noise}": choose one of {", ".join(NOISES)}.')
        subjects = tuple(s for s in subjects if s.strength > 0)
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        options = {name: value for name, value in kwargs.items() if name in accepted}
        overrides = {name: value for name, value in kwargs.items() if name not in accepted}
        given = [prompt] if isinstance(prompt, str) else list(prompt)
        scenes = [one for one in given for _ in range(num_images_per_prompt)]
        placed = [subject.placed for subject in subjects if subject.placed is not None]
        named: list[Any] = [method] if isinstance(method, str | Control) else list(method)
        worded = any(isinstance(one, str) and one in WORDED for one in named)
        spoken = words_for(self.pipe, subjects if worded else (), words, among, seed)
        about: dict[str, Any] = {
            "subjects": subjects,
            "embeddings": {phrase: word.embedding for phrase, word in spoken.items()},
        }

        def made(references: list[str]) -> list[Control]:
            about["regions"] = [placed] * len(scenes) + [[] for _ in references]
            about["phrases"] = [[s.phrase for s in subjects]] * len(scenes) + [[] for _ in references]
            return make_controls(method, ("subjects", "layout"), about, overrides)

        references = reference_prompts(subjects)
        controls = made(references)
        if not needs_rows(controls):
            references, subjects = [], ()
            controls = made(references)
        prompts = [*scenes, *references]
        pipe = share(self.pipe)
        seeds = [seed + i % num_images_per_prompt for i in range(len(scenes))]
        seeds += [seed + REFERENCE_SEED] * len(references)
        arguments: dict[str, Any] = {
            **options,
            "num_inference_steps": num_inference_steps,
            "generator": [torch.Generator().manual_seed(one) for one in seeds],
        }
        keep: dict[str, Any] = {"noise_scale": noise_scale, "seed": seed % REFERENCE_SEED}
        if reference_noise == "fresh":
            keep["noise_kind"] = "fresh"
        elif reference_noise == "inversion" and subjects:
            keep["trajectory"] = path = _trajectories(pipe, subjects, num_inference_steps, options)
            start = [torch.randn(path.shape[2:], generator=one) for one in arguments["generator"][: len(scenes)]]
            arguments["latents"] = torch.cat([torch.stack(start).to(path), path[0]])
        with control(pipe, DrawReferences(subjects, **keep), *controls, record=record) as run:
            drawn = pipe(**call_arguments(pipe, prompts, guidance, arguments)).images
        found = {phrase: word.found for phrase, word in spoken.items() if word.found is not None}
        return SubjectsResult(list(drawn[: len(scenes)]), list(drawn[len(scenes) :]), run, found)


def _trajectories(pipe: Any, subjects: Sequence[Subject], steps: int, options: dict[str, Any]) -> torch.Tensor:
    """DDIM run backwards from each reference: (steps + 1, references, channels, height, width)."""
    use_ddim(pipe, "inversion of references")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor if hasattr(pipe, "unet") else None
    height, width = (int(options.get(name) or side or 0) for name in ("height", "width"))
    if not height or not width:
        raise ControlError("inverting references needs the size of the run: give height and width.")
    found = []
    for subject in subjects:
        for one in subject.references:
            picture = one.fitted(height, width).picture.resize((width, height), Image.Resampling.LANCZOS)
            with torch.no_grad():
                found.append(ddim_trajectory(Job(pipe, picture, [subject.text], steps=steps, call=options)))
    return torch.cat(found, dim=1)
