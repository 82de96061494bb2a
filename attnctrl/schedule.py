"""Reading a diffusers scheduler: which step of its schedule runs, and how it scales the denoiser's input."""

from __future__ import annotations

from typing import Any

import torch

from attnctrl.sites import Step


class Schedule:
    """The schedule of one sampling; the timesteps are read once, because on a GPU every look costs a wait."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.timesteps: list[float] = []
        self.first = 0

    def step(self, timestep: float, done: int) -> Step:
        """The step that the denoiser is called for, after `done` steps of the scheduler.

        Image-to-image runs begin late. Only the first call's timestep is looked up, and only where the scheduler was
        not told: some schedules hold timesteps twice, and some pipelines round them.
        """
        if not self.timesteps:
            self.timesteps = self.scheduler.timesteps.tolist()
            begin = getattr(self.scheduler, "begin_index", None)
            distances = [abs(t - timestep) for t in self.timesteps]
            self.first = distances.index(min(distances)) if begin is None else int(begin)
        index = min(self.first + done, len(self.timesteps) - 1)
        value, config = self.timesteps[index], self.scheduler.config
        noise = value / float(config.num_train_timesteps)
        # Mochi counts from noise upwards.
        inverted = getattr(config, "invert_sigmas", False)
        return Step(index, len(self.timesteps), value, 1 - noise if inverted else noise)

    def input_scale(self, step: Step | None) -> float:
        """What `scale_model_input` multiplies the latents by at `step`."""
        if step is None or not hasattr(self.scheduler, "scale_model_input"):
            return 1.0
        return float(self.scheduler.scale_model_input(torch.ones(1), self.scheduler.timesteps[step.index]))

    def prediction(self, clean: torch.Tensor, sample: torch.Tensor, step: Step) -> torch.Tensor:
        """What a denoiser would predict that took `clean` for the picture in its input `sample`; float32.

        Both (batch, channels, height, width). With sample = (1 - s) clean + s noise under rectified flow and
        sample = sqrt(1 - s^2) clean + s noise else, it is noise - clean for the one, and for the other whichever of
        noise, velocity and picture the scheduler's `prediction_type` names.
        """
        clean, sample = clean.float(), sample.float()
        if self.flow:
            return (sample - clean) / self._sigma(step)
        kept = self._kept(step)
        return self._of(clean, (sample - kept**0.5 * clean) / (1 - kept) ** 0.5, kept)

    def prediction_of_noise(self, noise: torch.Tensor, sample: torch.Tensor, step: Step) -> torch.Tensor:
        """What a denoiser would predict that took `noise` for the noise in its input `sample`; else as `prediction`."""
        noise, sample = noise.float(), sample.float()
        if self.flow:
            return (noise - sample) / (1 - self._sigma(step))
        kept = self._kept(step)
        return self._of((sample - (1 - kept) ** 0.5 * noise) / kept**0.5, noise, kept)

    def clean(self, prediction: torch.Tensor, sample: torch.Tensor, step: Step) -> torch.Tensor:
        """The picture that `prediction` takes for what is in the denoiser's input `sample`: undoes `prediction`."""
        prediction, sample = prediction.float(), sample.float()
        if self.flow:
            return sample - self._sigma(step) * prediction
        kept, kind = self._kept(step), self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (sample - (1 - kept) ** 0.5 * prediction) / kept**0.5
        return prediction if kind == "sample" else kept**0.5 * sample - (1 - kept) ** 0.5 * prediction

    def noised_next(self, clean: torch.Tensor, noise: torch.Tensor, step: Step) -> torch.Tensor:
        """The sampler's latents after `step` if `clean` were the picture and `noise` its noise; float32.

        Both (batch, channels, height, width), the noise of unit variance. After the last step it is the picture.
        """
        if step.index + 1 >= step.total:
            return clean.float()
        value = self.timesteps[step.index + 1]
        then = Step(step.index + 1, step.total, value, value / float(self.scheduler.config.num_train_timesteps))
        if self.flow:
            kept, left = 1 - self._sigma(then), self._sigma(then)
        else:
            kept, left = self._kept(then) ** 0.5, (1 - self._kept(then)) ** 0.5
        return (kept * clean.float() + left * noise.float()) / self.input_scale(then)

    def clean_scale(self, step: Step) -> float:
        """What the clean picture is multiplied by in the denoiser's input."""
        return 1 - self._sigma(step) if self.flow else self._kept(step) ** 0.5

    @property
    def flow(self) -> bool:
        """Whether the model draws by rectified flow."""
        config = self.scheduler.config
        kind = config.get("prediction_type", "flow_prediction")
        return kind == "flow_prediction" or bool(config.get("use_flow_sigmas", False))

    def _sigma(self, step: Step) -> float:
        """The share of noise under rectified flow."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        return step.noise if sigmas is None else float(sigmas[step.index])

    def _kept(self, step: Step) -> float:
        """The share of the picture's variance that is left."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is None:
            return float(self.scheduler.alphas_cumprod[int(step.timestep)])
        # sigma^2 counts noise against a picture of weight 1; the denoiser's input has unit variance.
        return 1 / (1 + float(sigmas[step.index]) ** 2)

    def _of(self, clean: torch.Tensor, noise: torch.Tensor, kept: float) -> torch.Tensor:
        """Both as the scheduler's kind of prediction."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        return clean if kind == "sample" else kept**0.5 * noise - (1 - kept) ** 0.5 * clean

    @property
    def start_scale(self) -> float:
        """What pipelines multiply the first noise by."""
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))
