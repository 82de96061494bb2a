"""Objects in their boxes: the stock pictures, every layout method, and what the detector finds in them.

    python demos/layout.py --out outputs

Draws three prompts on the shipped shapes model and leaves in the folder: layout.png (stock and controlled pictures
with the boxes drawn in), attention.png (where each phrase looked), layout.md (the table that is also printed).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from attnctrl import Region, shapes
from attnctrl.models import load_pipeline
from attnctrl.pictures import sheet, with_regions
from attnctrl.pipelines import LayoutPipeline

# What is asked for: a prompt's objects as (colour, shape, box), and the seed of the noise.
SCENES = (
    ("white", 3, [("red", "circle", (0.05, 0.52, 0.42, 0.92)), ("blue", "square", (0.55, 0.08, 0.92, 0.46))]),
    ("gray", 8, [("green", "star", (0.06, 0.08, 0.44, 0.46)), ("purple", "heart", (0.56, 0.54, 0.94, 0.92))]),
    (
        "beige",
        5,
        [
            ("yellow", "triangle", (0.05, 0.06, 0.40, 0.42)),
            ("blue", "ring", (0.58, 0.10, 0.94, 0.46)),
            ("red", "square", (0.32, 0.58, 0.68, 0.94)),
        ],
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    layout = LayoutPipeline(load_pipeline("shapes-sd"))
    layout.pipe.set_progress_bar_config(desc="drawing", leave=False)
    methods = ["none", *layout.methods]
    pictures, heat, found = [], [], {name: [0, 0] for name in methods}
    for background, seed, objects in SCENES:
        asked = [(shape, colour) for colour, shape, _ in objects]
        boxes = [box for _, _, box in objects]
        prompt, phrases = shapes.prompt_for(asked, background)
        regions = [Region(phrase, box=box) for phrase, box in zip(phrases, boxes, strict=True)]
        print(f"{prompt}")
        for name in methods:
            result = layout(
                prompt,
                regions,
                method=name,
                num_inference_steps=25,
                guidance_scale=3.5,
                generator=torch.Generator().manual_seed(seed),
            )
            picture = result.images[0]
            share = shapes.in_box(asked, boxes, shapes.detect(picture))
            found[name][0] += round(share * len(asked))
            found[name][1] += len(asked)
            pictures.append((f"{name}  {share * len(asked):.0f}/{len(asked)}", with_regions(picture, regions)))
            if name == "loco":
                big = picture.resize((256, 256))
                heat += [(phrase, result.run.maps.overlay(big, phrase)) for phrase in phrases]

    sheet(pictures, columns=len(methods)).save(out / "layout.png")
    sheet(heat, columns=len(heat)).save(out / "attention.png")
    table = ["| method | objects in their box |", "|---|---|"]
    table += [f"| {name} | {right} of {total} |" for name, (right, total) in found.items()]
    (out / "layout.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    print(f"pictures: {out / 'layout.png'}, {out / 'attention.png'}")


if __name__ == "__main__":
    main()
