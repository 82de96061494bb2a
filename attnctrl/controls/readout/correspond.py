"""Correspond: a point of one picture becomes an embedding, and that finds the same point in another picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.reading import MeanMaps, enlarged, text_shares
from attnctrl.controls.readout.learned import as_picture, finest, first_word, learned_words
from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step
from attnctrl.stepmaps import StepMaps
from attnctrl.text import Text

if TYPE_CHECKING:
    from attnctrl.run import Run


def bump(point: tuple[float, float], sigma: float, height: int, width: int) -> torch.Tensor:
    """exp(-d^2 / (2 sigma^2)) at the cells' centres, d the distance to the point; (height, width).

    point: (x, y), and sigma: fractions of the picture's sides.
    """
    x, y = (torch.arange(width) + 0.5) / width - point[0], (torch.arange(height) + 0.5) / height - point[1]
    return torch.exp(-(x[None] ** 2 + y[:, None] ** 2) / (2 * sigma**2))


def peak(maps: torch.Tensor) -> list[tuple[float, float]]:
    """(x, y) of the largest value's pixel centre in fractions, for each map of (maps, height, width)."""
    _, height, width = maps.shape
    at = maps.flatten(1).argmax(dim=1).tolist()
    return [((i % width + 0.5) / width, (i // width + 0.5) / height) for i in at]


@dataclass
class State:
    token: int
    tokens: int
    pictures: int
    device: torch.device
    maps: MeanMaps = field(default_factory=MeanMaps)


@dataclass(frozen=True)
class Correspond(Control):
    """Unsupervised semantic correspondence (Hedlin et al., NeurIPS 2023, arXiv 2305.15581).

    With `point`, (x, y) in fractions of the picture, it learns: the text is replaced by noise of unit variance, another
    one for each picture of the run, and beside `HoldPicture` of the first picture Adam moves all of it, so that the map
    of its first word is a bump of width `sigma` around the point (mean square error, mean over layers). `words(run)`
    gives these texts, and with `embeddings` it reads: they are the text, and `read(run, size)` gives the point of the
    other picture at which the mean map of all of them is largest. So several pictures per prompt are several attempts,
    as the paper's five.

    Departures: Gaussian noise on the pictures, where the code draws it uniformly; all heads; the steps of `window`
    instead of one noise level, as many moves in each as `iterations` says; no crops; a `rate` that suits the shapes
    world, where the paper's is 0.00238. Put HoldPicture after it, and draw with guidance 1. Families: all for pictures
    whose text is one tensor.
    """

    paper: ClassVar[str] = "arXiv 2305.15581"
    fixes: ClassVar[str] = "where is this point in another picture?"

    point: tuple[float, float] | None = None
    embeddings: torch.Tensor | None = field(default=None, compare=False, kw_only=True)
    sigma: float = param(0.0547, "width of the bump, as a fraction of the picture's side", 0.001, 1)
    rate: float = param(0.1, "Adam's learning rate on the text", 0, 10)
    iterations: int = param(16, "moves per step", 0, 1000)
    seed: int = param(0, "of the noise that the text begins with")
    window: Window = field(default=Window(0.6, 1.0), kw_only=True)
    where: Where = field(default=Where(max_tokens=1024), kw_only=True)

    @property
    def idle(self) -> bool:
        nothing = self.point is None or len(self.point) == 0 or self.rate == 0 or self.iterations == 0
        return self.window.empty or (self.embeddings is None and nothing)

    def context(self, text: Text, sampling: Sampling) -> Text:
        given = self._noise(text.positive) if self.embeddings is None else self.embeddings
        if given.shape[1:] != text.positive.shape[1:] or len(text.positive) % len(given):
            raise ControlError(
                f"Correspond: the embeddings have the shape {tuple(given.shape)}, and the run's text "
                f"{tuple(text.positive.shape)}: learn them with the same model, one for each picture of the run."
            )
        repeated = given.repeat(len(text.positive) // len(given), 1, 1)
        return text.change(positive=repeated.to(text.positive))

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed))

    def begin(self, sampling: Sampling) -> State:
        if sampling.latent_grid[0] > 1:
            raise ControlError("Correspond looks at pictures: it has no form for videos.")
        if self.embeddings is None:
            assert self.point is not None
            if len(self.point) != 2 or not all(0 <= v <= 1 for v in self.point):
                raise ControlError(
                    f"Correspond: point is {self.point}: give (x, y) in fractions of the picture, 0 to 1."
                )
        token = first_word(sampling, self.name)
        return State(token, sampling.text_tokens, sampling.batch, sampling.device)

    def sites(self, sampling: Sampling) -> list[Site]:
        """What is read by the loss needs no look of its own."""
        return [] if self.embeddings is None else super().sites(sampling)

    # learning -----------------------------------------------------------------------------------------------
    def learned(self, state: State) -> torch.Tensor:
        return torch.ones(state.pictures, state.tokens, dtype=torch.bool, device=state.device)

    def descent(self, step: Step) -> Descent | None:
        return Descent(self.rate, self.iterations, adam=True) if self.embeddings is None else None

    def loss(self, maps: StepMaps, step: Step, state: State) -> Loss:
        assert self.point is not None
        layers = maps.cross_layers()
        height, width = finest(layers)
        wanted = bump(self.point, self.sigma, height, width).to(state.device)
        found = [enlarged(as_picture(one.probs[..., [state.token]], one), height, width)[:, 0] for one in layers]
        return Loss(torch.stack([(one - wanted).square().mean(dim=(1, 2)) for one in found]).mean(dim=0))

    def words(self, run: Run) -> torch.Tensor:
        """The texts learned in the run's last call, (pictures, tokens, channels)."""
        gained = learned_words(run, self)
        return self._noise(gained) + gained

    # reading ------------------------------------------------------------------------------------------------
    def inputs(self, call: Call, state: State) -> Call:
        grid = call.queries.grid
        assert grid is not None
        found = text_shares(call)[..., [state.token]].transpose(1, 2)
        state.maps.add(call.step.index, call.site.name, grid, found)
        return call

    def read(self, run: Run, size: tuple[int, int]) -> tuple[float, float]:
        """(x, y) in fractions, found at `size` (width, height) in the run's last call, whose pictures are attempts.

        Raises ControlError where nothing was read.
        """
        state: State = run.state(self)
        grids = state.maps.means()
        if not grids:
            raise ControlError("Correspond has read nothing: give embeddings, and a window that holds steps.")
        width, height = size
        maps = torch.stack([enlarged(m, height, width) for m in grids.values()]).mean(dim=(0, 1))
        return peak(maps)[0]
