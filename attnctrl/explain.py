"""One self-contained HTML page about a run: what was asked, what came out, and which control did what, where and when.

Nothing in the page points outside of it: pictures are data, curves are inline SVG, and there is no script.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version

from PIL import Image

from attnctrl.maps import Maps
from attnctrl.pictures import OUTLINES, heat_map, with_regions
from attnctrl.regions import Region
from attnctrl.report import Acted, Report
from attnctrl.run import Run
from attnctrl.sampling import LossValue, Sampling

STEPS, SIDE = 12, 192
"""Steps whose maps are shown at most, evenly spaced; and the longer side of an overlay in pixels."""

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --accent: #0077ff; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.note { opacity: .7; margin: 0 0 .8rem; } .tokens { display: flex; flex-wrap: wrap; gap: .3rem; }
.tokens span { border: 1px solid var(--line); border-radius: .3rem; padding: 0 .4rem; }
.tokens small { opacity: .6; margin-left: .3rem; }
.pair { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
figure { margin: 0; } figcaption { opacity: .7; font-size: .85rem; }
.main { width: 17rem; max-width: 100%; image-rendering: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
tr + tr > * { border-top: 1px solid var(--line); } td.number { font-variant-numeric: tabular-nums; }
.strip { overflow-x: auto; } .strip td, .strip th { padding: .15rem .2rem; border: 0; white-space: nowrap; }
.strip small { font-weight: normal; opacity: .7; } .strip td, .strip th { vertical-align: middle; }
.strip img { display: block; } .cell { width: 3.2rem; image-rendering: pixelated; } .over { width: 6rem; }
.strip .step { font-weight: normal; opacity: .7; font-size: .8rem; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
code { font-size: .85em; } summary { cursor: pointer; }
"""


def page(
    run: Run,
    picture: Image.Image,
    prompt: str,
    regions: Sequence[Region] = (),
    facts: Mapping[str, object] | None = None,
) -> str:
    """The page about picture 0 of the run's last pipeline call.

    picture: as the pipeline returned it. regions: drawn on it. facts: what to list about the call, by name.
    """
    shown = {**(facts or {}), "pixels": f"{picture.width} x {picture.height}"}
    parts = [
        f"<h1>{escape(prompt)}</h1>",
        _tokens(run.sampling),
        _pictures(picture, regions, shown),
        _maps(run.maps, picture),
        _losses(run.losses),
        _report(run.report, 0 if run.sampling is None else len(run.sampling.steps_seen)),
        f'<p class="note">attnctrl {escape(version("attnctrl"))}</p>',
    ]
    head = f'<meta charset="utf-8"><title>{escape(prompt)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _tokens(sampling: Sampling | None) -> str:
    """The tokens of the first encoder, with their places."""
    if sampling is None or sampling.prompts is None:
        return ""
    read = sampling.tokens[0][0]
    words = [(i, t) for i, (t, (a, b)) in enumerate(zip(read.tokens, read.spans, strict=True)) if a < b]
    spans = "".join(f"<span>{escape(token)}<small>{i + read.offset}</small></span>" for i, token in words)
    return f'<p class="note">Its tokens and their places:</p><div class="tokens">{spans}</div>'


def _pictures(picture: Image.Image, regions: Sequence[Region], facts: Mapping[str, object]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items())
    figures = [_figure(picture, "picture")]
    if regions:
        figures.append(_figure(with_regions(picture, regions), "regions"))
        for region, colour in zip(regions, OUTLINES * len(regions), strict=False):
            place = "mask" if region.box is None else ", ".join(f"{v:.2f}" for v in region.box)
            swatch = f'<span class="swatch" style="background:{colour}"></span>'
            rows += f"<tr><th>{swatch}{escape(region.phrase)}</th><td>{place}</td></tr>"
    return f'<h2>Picture</h2><div class="pair">{"".join(figures)}<table>{rows}</table></div>'


def _maps(maps: Maps, picture: Image.Image) -> str:
    """Per phrase its overlay and its map in each step, on one colour scale per phrase."""
    steps = maps.steps
    if not steps:
        return ""
    chosen = _spaced(len(steps), STEPS)
    heads = "".join(f'<th class="step">{steps[i]}</th>' for i in chosen)
    rows = []
    for phrase in maps.phrases:
        recorded = maps.of(phrase)
        recorded = recorded.mean(dim=1) if recorded.ndim == 4 else recorded
        limits = float(recorded.min()), float(recorded.max())
        size = recorded.shape[2], recorded.shape[1]
        over = maps.overlay(picture, phrase)
        over.thumbnail((SIDE, SIDE))
        cells = "".join(
            f"<td>{_img(heat_map(recorded[i], size, limits), f'{phrase}, step {steps[i]}', 'cell')}</td>"
            for i in chosen
        )
        scale = f"<small>{limits[0]:.2g} to {limits[1]:.2g}</small>"
        rows.append(
            f"<tr><th>{escape(phrase)}<br>{scale}</th><td>{_img(over, f'{phrase}, all steps', 'over')}</td>{cells}</tr>"
        )
    some = "" if len(chosen) == len(steps) else f" {len(chosen)} of {len(steps)} steps are shown."
    note = (
        f"The share of each pixel's attention that the words get, mean over heads and layers; dark is the least of "
        f"the range that stands under the word.{some}"
    )
    table = f'<table><tr><th></th><th class="step">all steps</th>{heads}</tr>{"".join(rows)}</table>'
    return f'<h2>Attention by word and step</h2><p class="note">{note}</p><div class="strip">{table}</div>'


def _losses(losses: Sequence[LossValue]) -> str:
    if not losses:
        return ""
    parts = ["<h2>Losses by step</h2>"]
    for name in dict.fromkeys(one.control for one in losses):
        own = [one for one in losses if one.control == name]
        parts.append(f"<figure>{_curve(own)}<figcaption>{escape(name)}: {len(own)} evaluations, from "
                     f"{own[0].values[0]:.4g} to {own[-1].values[0]:.4g}</figcaption></figure>")  # fmt: skip
    return "".join(parts)


def _curve(losses: Sequence[LossValue]) -> str:
    """The values of picture 0 as a line; the evaluations of one step lie evenly between it and the next."""
    width, height, left, under = 720, 150, 60, 22
    count = {s: sum(one.step == s for one in losses) for s in {one.step for one in losses}}
    x = [one.step + one.iteration / count[one.step] for one in losses]
    y = [one.values[0] for one in losses]
    low, high = min(y), max(y)
    first, last = min(count), max(count) + 1

    def place(a: float, b: float) -> tuple[float, float]:
        share = (b - low) / (high - low) if high > low else 0.5
        return left + (width - left - 8) * (a - first) / (last - first), 8 + (height - under - 16) * (1 - share)

    points = [place(a, b) for a, b in zip(x, y, strict=True)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2" fill="var(--accent)"/>' for a, b in points)
    ticks = "".join(
        f'<text x="{place(s, low)[0]:.1f}" y="{height - 6}" text-anchor="middle">{s}</text>'
        for s in [sorted(count)[i] for i in _spaced(len(count), STEPS)]
    )
    sides = f'<text x="4" y="14">{high:.3g}</text><text x="4" y="{height - under - 4}">{low:.3g}</text>'
    drawn = f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="1.5"/>'
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{drawn}{dots}{ticks}{sides}</svg>'


def _report(report: Report, total: int) -> str:
    if not report.rows:
        return '<h2>What acted where</h2><p class="note">No control acted: this is the stock picture.</p>'
    heads = "".join(f"<th>{h}</th>" for h in ("control", "point", "layers", "steps", "calls", "seconds"))
    rows = "".join(_row(row, total) for row in report.rows.values())
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in report.sparse_lines())
    return f"<h2>What acted where</h2><table><tr>{heads}</tr>{rows}</table>{notes}"


def _row(row: Acted, total: int) -> str:
    names = "".join(f"<br><code>{escape(name)}</code>" for name in sorted(row.sites))
    sites = f"<details><summary>{len(row.sites)}</summary>{names}</details>" if row.sites else "-"
    unit = 160 / max(total, max(row.steps) + 1)
    bars = "".join(
        f'<rect x="{s * unit:.2f}" y="2" width="{max(unit - 1, 0.5):.2f}" height="10" fill="var(--accent)"/>'
        for s in sorted(row.steps)
    )
    span = f"{min(row.steps)} to {max(row.steps)}"
    steps = f'<svg viewBox="0 0 160 14" width="160" role="img"><title>{span}</title>{bars}</svg> {span}'
    cells = [escape(row.control), row.point, sites, steps, str(row.calls), f"{row.seconds:.3f}"]
    return "<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>"


def _spaced(count: int, most: int) -> list[int]:
    """At most so many of 0 .. count - 1, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _figure(picture: Image.Image, caption: str) -> str:
    return f"<figure>{_img(picture, caption, 'main')}<figcaption>{escape(caption)}</figcaption></figure>"


def _img(picture: Image.Image, text: str, kind: str) -> str:
    kept = io.BytesIO()
    picture.save(kept, format="PNG")
    data = base64.b64encode(kept.getvalue()).decode()
    return f'<img class="{kind}" alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'
