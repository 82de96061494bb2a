"""Through-The-Mask: each object sees its own prompt and itself, in every frame of its track."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups, masked_attention
from attnctrl.layout import Regions, per_prompt
from attnctrl.references import cells
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid

MOST = 63
"""Objects of a picture: the groups of a mask, less one for what is nobody's."""


def key_frames(frame: int, frames: int, given: int) -> range:
    """Which of `given` key frames, spread evenly over the run, fall into a latent frame: at least one."""
    first = frame * given // frames
    return range(first, max(-(-(frame + 1) * given // frames), first + 1))


def tracked(objects: Sequence[str], tracks: Sequence[Sequence[Region]], grid: Grid) -> torch.Tensor:
    """Where each object is: bool (objects, frames * height * width), of several key frames in one their union.

    An object that no region of a key frame names is out of sight in it.
    """
    frames, height, width = grid
    found = torch.zeros(len(objects), frames, height, width, dtype=torch.bool)
    for frame in range(frames):
        for at in key_frames(frame, frames, len(tracks)):
            for region in tracks[at]:
                found[objects.index(region.phrase), frame] |= cells(region, height, width).view(height, width)
    return found.flatten(1)


def apart(inside: torch.Tensor) -> torch.Tensor:
    """The objects and, as one more, what is nobody's: bool (batch, tokens, objects + 1) of (batch, objects, tokens)."""
    return torch.cat([inside, ~inside.any(dim=1, keepdim=True)], dim=1).transpose(1, 2)


@dataclass
class State:
    """lists: the regions of each prompt. contexts: their texts, (pictures, objects, tokens, channels).

    keys, inside, groups: what was made of them, by layer, by grid, and by kind of attention and grid.
    """

    lists: list[list[Region]]
    images: int
    device: torch.device
    contexts: torch.Tensor
    names: frozenset[str]
    keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    inside: dict[Grid, torch.Tensor] = field(default_factory=dict)
    groups: dict[tuple[str, Grid], TokenGroups] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectMasks(Control):
    """Masked cross- and spatio-temporal self-attention of Through-The-Mask (Yariv et al., arXiv 2501.03059).

    Masked cross-attention: the latents of an object see the prompts of the objects that they belong to (`Region.prompt`
    or the phrase), in one softmax. Masked self-attention: they see the latents of the same object, in all frames; what
    is nobody's is one more object. Of each, a share is mixed in: h + weight (masked - h). Latents of nobody have no
    prompt of their own and keep h.
    regions: where the objects are, in all frames; tracks: for clips, regions like these of key frames, spread evenly
    over the clip, objects being matched by phrase; one that a key frame does not name is out of sight in it. Of
    several key frames in one latent frame the union counts.
    Departures: the paper adds the masked layers as residuals that it trains, in its first K blocks (K is not given),
    and makes the masks by a motion model of its own; here the model's own layers are asked again, and masks are given.
    Families: UNets and transformers with cross-attention, for pictures and videos.
    """

    paper: ClassVar[str] = "arXiv 2501.03059"
    fixes: ClassVar[str] = "objects of a clip that exchange looks or motion, from masks or tracks"
    needs_rows: ClassVar[bool] = False

    window: Window = field(default=Window(0.0, 0.5), kw_only=True)
    where: Where = field(default=Where(kinds=("cross", "self")), kw_only=True)
    regions: Regions = ()
    tracks: Sequence[Sequence[Region]] = field(default=(), kw_only=True)
    cross_weight: float = param(0.5, "share of the masked cross-attention", 0, 1)
    self_weight: float = param(0.2, "share of the masked self-attention", 0, 1)
    until_layer: float = param(1.0, "share of the layers, in order, that take part", 0, 1)

    @property
    def idle(self) -> bool:
        nothing = self.until_layer == 0 or (self.cross_weight == 0 and self.self_weight == 0)
        return self.window.empty or nothing or not (any(self.regions) or any(self.tracks))

    def begin(self, sampling: Sampling) -> State:
        if any(self.regions) and self.tracks:
            raise ControlError(f"{self.name} got regions and tracks: give one of the two.")
        if self.tracks:
            named: dict[str, Region] = {}
            for region in (one for frame in self.tracks for one in frame):
                named.setdefault(region.phrase, region)
            lists = [list(named.values())] * sampling.prompt_count
        else:
            lists = per_prompt(self.regions, sampling.prompt_count)
        most = max(map(len, lists))
        if most > MOST:
            raise ControlError(f"{self.name} got {most} objects: it takes at most {MOST} of a picture.")
        for region in (one for row in (*lists, *self.tracks) for one in row):
            region.check_aspect(*sampling.latent_grid[1:])
        chosen = self.where.select(sampling.sites, sampling.latent_grid)
        if not any(site.kind in ("cross", "self") for site in chosen):
            raise ControlError(
                f"{self.name} needs layers that take text as keys, which this model does not have: use RegionPrompts."
            )
        # Prompts with fewer objects repeat their first text, which nobody sees.
        texts = [
            [(row[i] if i < len(row) else row[0]).text for i in range(most)] if row else [""] * most for row in lists
        ]
        encoded = sampling.encode([text for row in texts for text in row]).positive.unflatten(0, (len(texts), most))
        contexts = encoded.repeat_interleave(sampling.images_per_prompt, dim=0).to(sampling.device, sampling.dtype)
        names = frozenset(site.name for site in chosen[: round(self.until_layer * len(chosen))])
        return State(lists, sampling.images_per_prompt, sampling.device, contexts, names)

    def output(self, output: torch.Tensor, call: Call, state: State) -> torch.Tensor:
        grid, weight = call.queries.grid, self.cross_weight if call.site.kind == "cross" else self.self_weight
        if call.site.name not in state.names or grid is None or weight == 0:
            return output
        inside = self._inside(state, grid)
        masked = (self._cross if call.site.kind == "cross" else self._own)(call, state, inside, grid)
        anybody = inside.any(dim=1)[:, None, :, None]
        whose = anybody if call.site.kind == "cross" else anybody.any(dim=2, keepdim=True)
        return torch.where(whose, output + weight * (masked.to(output.dtype) - output), output)

    def _inside(self, state: State, grid: Grid) -> torch.Tensor:
        """Where the objects of each picture are: bool (pictures, objects, latent tokens)."""
        if grid not in state.inside:
            rows = []
            for row in state.lists:
                frames = self.tracks or [row]
                found = torch.zeros(state.contexts.shape[1], grid[0] * grid[1] * grid[2], dtype=torch.bool)
                if row:
                    found[: len(row)] = tracked([region.phrase for region in row], frames, grid)
                rows.append(found)
            state.inside[grid] = torch.stack(rows).to(state.device).repeat_interleave(state.images, dim=0)
        return state.inside[grid]

    @staticmethod
    def _cross(call: Call, state: State, inside: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The attention to the objects' own prompts; 0 for latents of nobody."""
        assert call.project is not None
        batch, objects, tokens, _ = state.contexts.shape
        if call.site.name not in state.keys:
            with torch.inference_mode(False), torch.no_grad():
                state.keys[call.site.name] = call.project(state.contexts.flatten(1, 2))
        if ("cross", grid) not in state.groups:
            whose = torch.eye(objects, dtype=torch.bool, device=state.device).repeat_interleave(tokens, dim=0)
            members = inside.transpose(1, 2), whose[None].expand(batch, -1, -1)
            state.groups["cross", grid] = TokenGroups.from_members(*members)
        return masked_attention(call.query, *state.keys[call.site.name], state.groups["cross", grid], call.scale)

    @staticmethod
    def _own(call: Call, state: State, inside: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The attention of each object to itself."""
        if ("self", grid) not in state.groups:
            state.groups["self", grid] = TokenGroups.from_members(apart(inside))
        groups = state.groups["self", grid]
        groups = groups if call.mask is None else groups.padded(call.mask)
        return masked_attention(call.query, call.key, call.value, groups, call.scale)
