"""Analytic renderer: signed distances of the eight shapes, one pixel of anti-aliasing, batched in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .world import GROUND, HALF_EXTENT, PALETTE, Scene, Thing

JITTER, GRADIENT = 0.025, 0.05


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - HALF_EXTENT["square"][0]


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    half_w, half_h = HALF_EXTENT["triangle"]
    slope = math.sqrt(3) / 2 * x.abs() - 0.5 * (y - half_h) - math.sqrt(3) / 2 * half_w
    return torch.maximum(slope, y - half_h)


def _star(x: Tensor, y: Tensor) -> Tensor:
    # Fold the plane into one tenth, where the star is a single edge from a tip to a notch.
    outer, inner = 1.08, 0.45
    up, x = outer - HALF_EXTENT["star"][1] - y, x.abs()
    cos36, sin36 = math.cos(math.pi / 5), math.sin(math.pi / 5)
    fold = (cos36 * x - sin36 * up).clamp(min=0)
    x, up = x - 2 * fold * cos36, up + 2 * fold * sin36
    fold = (-cos36 * x - sin36 * up).clamp(min=0)
    x, up = (x + 2 * fold * cos36).abs(), up + 2 * fold * sin36 - outer
    edge_x, edge_y = inner * outer * sin36, inner * outer * cos36 - outer
    along = ((x * edge_x + up * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, 1)
    distance = torch.hypot(x - edge_x * along, up - edge_y * along)
    return distance * torch.sign(up * edge_x - x * edge_y)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    long, thick = HALF_EXTENT["cross"][0], 0.34
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - long, y - thick), torch.maximum(x - thick, y - long))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    inner = 0.54
    return (torch.hypot(x, y) - (1 + inner) / 2).abs() - (1 - inner) / 2


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.62
    x, up = x.abs() / scale, (HALF_EXTENT["heart"][1] - y) / scale
    lobe = torch.hypot(x - 0.25, up - 0.75) - math.sqrt(2) / 4
    half = 0.5 * (x + up).clamp(min=0)
    tip = torch.minimum(torch.hypot(x, up - 1), torch.hypot(x - half, up - half)) * torch.sign(x - up)
    return torch.where(x + up > 1, lobe, tip) * scale


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    half_w, half_h = HALF_EXTENT["diamond"]
    return (x.abs() / half_w + y.abs() / half_h - 1) * (half_w * half_h / math.hypot(half_w, half_h))


_DISTANCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star,
    "cross": _cross, "ring": _ring, "heart": _heart, "diamond": _diamond,
}  # fmt: skip


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance, negative inside, of a shape of r = 1 centred at 0; exact near the edge. y runs down."""
    return _DISTANCE[shape](x, y)


def _windows(things: Sequence[Thing], size: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Coverage of each thing in a window around it: (things, w, w) in 0..1, and each window's (top, left) pixel."""
    reach = 1.25 * max(t.r for t in things) * size + 2
    width = 2 * math.ceil(reach)
    corners = [(round(t.cy * size) - width // 2, round(t.cx * size) - width // 2) for t in things]
    ticks = torch.arange(width, dtype=torch.float32) + 0.5
    out = torch.empty(len(things), width, width)
    for shape in {t.shape for t in things}:
        index = [i for i, t in enumerate(things) if t.shape == shape]
        radius = torch.tensor([things[i].r * size for i in index])[:, None, None]
        left = torch.tensor([corners[i][1] - things[i].cx * size for i in index])[:, None, None]
        top = torch.tensor([corners[i][0] - things[i].cy * size for i in index])[:, None, None]
        x, y = (left + ticks[None, None, :]) / radius, (top + ticks[None, :, None]) / radius
        x, y = torch.broadcast_tensors(x, y)
        out[index] = (0.5 - signed_distance(shape, x, y) * radius).clamp(0, 1)
    return out, corners


def _paste(canvas: Tensor, window: Tensor, corner: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The parts of canvas (..., size, size) and window (w, w) that overlap."""
    size, width = canvas.shape[-1], window.shape[-1]
    top, left = corner
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = max(min(top + width, size), y0), max(min(left + width, size), x0)
    return canvas[..., y0:y1, x0:x1], window[max(y0 - top, 0) : y1 - top, max(x0 - left, 0) : x1 - left]


def _grounds(scenes: Sequence[Scene], size: int, rng: np.random.Generator | None) -> Tensor:
    """Backgrounds (scenes, 3, size, size); with rng: jittered colour and a faint linear gradient."""
    colour = torch.tensor([GROUND[s.background] for s in scenes])
    if rng is None:
        return colour[:, :, None, None].repeat(1, 1, size, size)
    colour = colour + torch.from_numpy(rng.uniform(-JITTER, JITTER, colour.shape)).float()
    angle = torch.from_numpy(rng.uniform(0, 2 * math.pi, len(scenes))).float()[:, None, None]
    amplitude = torch.from_numpy(rng.uniform(0, GRADIENT, len(scenes))).float()[:, None, None]
    ramp = torch.linspace(-0.5, 0.5, size)
    tilt = amplitude * (torch.cos(angle) * ramp[None, None, :] + torch.sin(angle) * ramp[None, :, None])
    return colour[:, :, None, None] + tilt[:, None]


def render(scenes: Sequence[Scene], size: int = 128, rng: np.random.Generator | None = None) -> Tensor:
    """Draw scenes.

    Args:
        scenes: what to draw; later things cover earlier ones.
        size: image side in pixels.
        rng: None draws the exact palette on flat ground; a generator adds the training world's colour jitter
            (uniform, ±0.025 per channel) and a linear gradient of the ground (up to 0.05 from side to side).

    Returns:
        (scenes, 3, size, size) float32 in 0..1, on the CPU.
    """
    ground = _grounds(scenes, size, rng)
    return _drawn(scenes, ground, _colours([t for s in scenes for t in s.things], rng))


def render_clip(scenes: Sequence[Scene], size: int = 128, rng: np.random.Generator | None = None) -> Tensor:
    """Draw the frames of one clip: scenes with the same things in the same order, at other places.

    As `render`, but ground and colours are drawn once, for the first frame, and kept.
    """
    ground = _grounds(scenes[:1], size, rng).repeat(len(scenes), 1, 1, 1)
    return _drawn(scenes, ground, _colours(scenes[0].things, rng) * len(scenes))


def _colours(things: Sequence[Thing], rng: np.random.Generator | None) -> list[Tensor]:
    """The colour of each thing, (3,); with rng: jittered."""
    colour = torch.tensor([PALETTE[t.colour] for t in things]).view(-1, 3)
    if rng is not None:
        colour = colour + torch.from_numpy(rng.uniform(-JITTER, JITTER, colour.shape)).float()
    return list(colour)


def _drawn(scenes: Sequence[Scene], image: Tensor, colours: Sequence[Tensor]) -> Tensor:
    """The things of all scenes, each in its colour, on their grounds (scenes, 3, size, size), which are drawn on."""
    things = [(b, t) for b, s in enumerate(scenes) for t in s.things]
    if things:
        windows, corners = _windows([t for _, t in things], image.shape[-1])
        for (b, _), window, corner, c in zip(things, windows, corners, colours, strict=True):
            part, cover = _paste(image[b], window, corner)
            part.lerp_(c[:, None, None].expand_as(part), cover.expand_as(part))
    return image.clamp_(0, 1)


def coverage(scenes: Sequence[Scene], size: int = 128) -> Tensor:
    """How much of each pixel any thing covers: (scenes, size, size) float32 in 0..1."""
    out = torch.zeros(len(scenes), size, size)
    things = [(b, t) for b, s in enumerate(scenes) for t in s.things]
    if things:
        windows, corners = _windows([t for _, t in things], size)
        for (b, _), window, corner in zip(things, windows, corners, strict=True):
            part, cover = _paste(out[b], window, corner)
            torch.maximum(part, cover, out=part)
    return out


def thing_mask(thing: Thing, size: int = 128) -> Tensor:
    """Coverage of one thing, as if nothing covered it: (size, size) float32 in 0..1; > 0.5 is its binary mask."""
    return coverage([Scene((thing,), "white")], size)[0]
