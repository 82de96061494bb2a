"""Where the run of an edit starts, so that it leads back to a given picture: inversions behind one interface.

An inversion is a function from a `Job` to a `Start`. The run that follows draws the source and its edits together,
prompt=[source, edit, ...], with the start's latents, controls (those of `follow` first) and arguments; see
`attnctrl.pipelines.EditPipeline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from attnctrl.control import Control
from attnctrl.controls.editing.controlled_flow import TowardNoise, TowardPicture
from attnctrl.controls.editing.follow_source import FollowSource
from attnctrl.controls.editing.null_text import NullText
from attnctrl.controls.editing.source_guidance import SourceGuidance
from attnctrl.controls.editing.virtual_inversion import VirtualInversion
from attnctrl.encoding import encode_picture
from attnctrl.errors import ControlError
from attnctrl.models import call_arguments
from attnctrl.run import control


@dataclass(frozen=True)
class Job:
    """What is to be edited and how the run will be called.

    pipe: a light copy of the pipeline, whose scheduler an inversion may exchange. image: of the run's size. prompts:
    the source's, then those of the edits. images: pictures per prompt. seed: of the first picture's noise. call:
    further arguments of the pipeline.
    """

    pipe: Any
    image: Image.Image
    prompts: Sequence[str]
    images: int = 1
    steps: int = 50
    seed: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    def generators(self) -> list[torch.Generator]:
        """One per picture of the run: an edit draws what its source draws."""
        seeds = [self.seed + i for i in range(self.images)] * len(self.prompts)
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def clean(self) -> torch.Tensor:
        """The picture's latents, (1, channels, rows, columns)."""
        return encode_picture(self.pipe, self.image, self.image.height, self.image.width)

    def of_every_picture(self, latents: torch.Tensor) -> torch.Tensor:
        """One picture's latents for all pictures of the run."""
        return latents.repeat(len(self.prompts) * self.images, *[1] * (latents.ndim - 1))


@dataclass(frozen=True)
class Start:
    """latents: of every picture of the run, None for noise. controls: what keeps the source itself, after the method's.
    call: arguments. follow: likewise, but before the method's controls, which then find the source where it belongs.
    trajectory: of the source, (steps + 1, 1, channels, rows, columns), where DDIM was run backwards.
    """

    latents: torch.Tensor | None
    controls: tuple[Control, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)
    follow: tuple[Control, ...] = ()
    trajectory: torch.Tensor | None = None


def ddim_trajectory(job: Job) -> torch.Tensor:
    """The latents (steps + 1, 1, channels, rows, columns) from noise to picture of DDIM run backwards.

    At guidance 1 with the source's prompt (Song et al., arXiv 2010.02502, sec. 4.3; Dhariwal and Nichol, 2105.05233).
    """
    from diffusers import DDIMInverseScheduler

    forward = job.pipe.scheduler
    job.pipe.scheduler = DDIMInverseScheduler.from_config(forward.config)
    found = [job.clean()]

    def keep(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        found.append(given["latents"])
        return {}

    try:
        options = {**job.call, "num_inference_steps": job.steps, "latents": found[0], "output_type": "latent"}
        options |= {"callback_on_step_end": keep, "num_images_per_prompt": 1}
        job.pipe(**call_arguments(job.pipe, job.prompts[0], 1.0, options))
    finally:
        job.pipe.scheduler = forward
    return torch.stack(found[::-1])


def ddim(job: Job) -> Start:
    """Draw on from where DDIM, run backwards, ends; guidance above 1 lets the source drift."""
    use_ddim(job.pipe, 'inversion "ddim"')
    trajectory = ddim_trajectory(job)
    return Start(job.of_every_picture(trajectory[0]), trajectory=trajectory)


def direct(job: Job) -> Start:
    """DDIM run backwards, and the source held to its trajectory: direct inversion (arXiv 2310.01506)."""
    use_ddim(job.pipe, 'inversion "direct"')
    trajectory = ddim_trajectory(job)
    return Start(job.of_every_picture(trajectory[0]), follow=(FollowSource(trajectory),), trajectory=trajectory)


def negative_prompt(job: Job) -> Start:
    """DDIM run backwards, and the source's prompt as the negative one: negative-prompt inversion (2305.16807)."""
    use_ddim(job.pipe, 'inversion "negative-prompt"')
    negative = [job.prompts[0]] * len(job.prompts)
    trajectory = ddim_trajectory(job)
    return Start(job.of_every_picture(trajectory[0]), call={"negative_prompt": negative}, trajectory=trajectory)


def null_text(job: Job) -> Start:
    """DDIM run backwards, and an unconditional embedding tuned for every step: null-text inversion (2211.09794)."""
    use_ddim(job.pipe, 'inversion "null-text"')
    trajectory = ddim_trajectory(job)
    return Start(job.of_every_picture(trajectory[0]), (NullText(trajectory, _levels(job)),), trajectory=trajectory)


def edit_friendly(job: Job) -> Start:
    """Independent noisings of the picture, retraced by DDPM: edit-friendly inversion (2304.06140).

    The edits begin after 0.36 of the run and the source has guidance 3.5, as published.
    """
    use_ddim(job.pipe, 'inversion "edit-friendly"')
    clean = job.clean()
    kept = _levels(job)[:-1].view(-1, 1, 1, 1, 1)
    generator = torch.Generator().manual_seed(job.seed)
    noise = torch.randn(job.steps, job.images, *clean.shape[1:], generator=generator).to(clean)
    noised = kept.sqrt().to(clean) * clean + (1 - kept).sqrt().to(clean) * noise
    trajectory = torch.cat([noised, clean.expand(1, job.images, *clean.shape[1:])])
    start = noised[0].repeat(len(job.prompts), 1, 1, 1)
    follow = FollowSource(trajectory, shared=True, start=0.36)
    return Start(start, (SourceGuidance(scale=3.5),), {"eta": 1.0}, follow=(follow,))


def rf(job: Job) -> Start:
    """The flow run backwards, led half-way to noise, and forwards, led to the picture: RF inversion (2410.10792)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from attnctrl.reversed_flow import ReversedFlow

    forward = job.pipe.scheduler
    if not isinstance(forward, FlowMatchEulerDiscreteScheduler):
        raise ControlError(
            f'inversion "rf" runs a rectified flow backwards, and the scheduler is {type(forward).__name__}: use '
            '"direct" or "virtual".'
        )
    job.pipe.scheduler = ReversedFlow.from_config(forward.config)
    options = {**job.call, "num_inference_steps": job.steps, "output_type": "latent", "num_images_per_prompt": 1}
    try:
        with control(job.pipe, TowardNoise(job.image, seed=job.seed), record=False):
            ended = job.pipe(**call_arguments(job.pipe, job.prompts[0], 1.0, options)).images
    finally:
        job.pipe.scheduler = forward
    return Start(job.of_every_picture(ended), (TowardPicture(job.image),))


def virtual(job: Job) -> Start:
    """Nothing is inverted: the edit keeps its distance to the noised source (InfEdit, FlowEdit).

    Models that predict noise draw by DDIM with eta 1, unless the call says otherwise, or by their own consistency
    sampler: what the edit's prediction is off by then goes with the old noise, in InfEdit all of it.
    """
    from diffusers import LCMScheduler

    if "beta_start" in job.pipe.scheduler.config and not isinstance(job.pipe.scheduler, LCMScheduler):
        use_ddim(job.pipe, 'inversion "virtual"')
    takes = "eta" in inspect.signature(type(job.pipe).__call__).parameters
    return Start(None, (VirtualInversion(job.image),), {"eta": 1.0, **job.call} if takes else {})


INVERSIONS: dict[str, Callable[[Job], Start]] = {
    "ddim": ddim,
    "direct": direct,
    "negative-prompt": negative_prompt,
    "null-text": null_text,
    "edit-friendly": edit_friendly,
    "virtual": virtual,
    "rf": rf,
}


def inversion(name: str) -> Callable[[Job], Start]:
    """The inversion called `name`. Raises ControlError for unknown names, listing the known ones."""
    if name not in INVERSIONS:
        raise ControlError(f'inversion "{name}" is unknown: choose one of {", ".join(INVERSIONS)}.')
    return INVERSIONS[name]


def _levels(job: Job) -> torch.Tensor:
    """The share of the picture's variance in the latents that each step is given, and in the last one's result."""
    scheduler = job.pipe.scheduler
    scheduler.set_timesteps(job.steps)
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])


def use_ddim(pipe: Any, who: str) -> None:
    """Give a pipeline's light copy a DDIM scheduler: the one whose steps can be run backwards.

    Raises ControlError for models of rectified flow; `who` needs it.
    """
    from diffusers import DDIMScheduler

    config = pipe.scheduler.config
    if "beta_start" not in config:
        raise ControlError(
            f"{who} needs a model that was trained to predict noise, and {type(pipe).__name__} draws by rectified "
            'flow: use "virtual" for edits, one noise for references.'
        )
    pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False)
