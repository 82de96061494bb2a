"""The start of a sampling: the pipeline has encoded its prompt."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.nn.utils.rnn import pad_sequence

from attnctrl.encoding import clean_latents
from attnctrl.errors import ControlError
from attnctrl.prompt import PromptTokens
from attnctrl.sampler import Sampler
from attnctrl.sampling import Sampling
from attnctrl.text import Text

if TYPE_CHECKING:
    from attnctrl.run import Run


def open_sampling(run: Run, stock: Callable, arguments: dict[str, Any], outputs: Any) -> tuple[Sampler, Any]:
    """Open a sampling when the pipeline encodes its prompt; the context point acts on what the encoders returned.

    stock: the pipeline's own `encode_prompt`; arguments: what it was called with.
    """
    pipe, family = run.pipe, run.family
    guided = bool(arguments.get("do_classifier_free_guidance"))
    text = family.text(family.parts(outputs, guided))
    images = int(arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1)
    first = arguments.get("prompt") if arguments.get("prompt") is not None else run.prompt
    prompts = None if first is None else [first] if isinstance(first, str) else list(first)
    count = text.positive.shape[0] // images
    if prompts is not None and len(prompts) != count:
        raise ControlError(f"control(prompt=...) names {len(prompts)} prompts for embeddings of {count}.")

    def tokenize(alone: list[str] | None = None) -> list[list[PromptTokens]]:
        per_encoder = []
        for reader in family.readers(pipe, arguments):
            texts = alone or arguments.get(reader.argument) or prompts or []
            texts = [texts] if isinstance(texts, str) else texts
            # Textual inversion spreads one word over several tokens; the pipeline does the same before encoding.
            convert = getattr(pipe, "maybe_convert_prompt", lambda t, _: t)
            per_encoder.append([reader.read(convert(t, reader.tokenizer)) for t in texts])
        return [list(one) for one in zip(*per_encoder, strict=True)]

    encoded: dict[tuple[str, ...], Text] = {}

    def encode(texts: list[str]) -> Text:
        if tuple(texts) not in encoded:
            encoded[tuple(texts)] = encode_anew(texts)
        return encoded[tuple(texts)]

    def encode_anew(texts: list[str]) -> Text:
        given: dict[str, Any] = {}
        for name, parameter in inspect.signature(stock).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            if "prompt" not in name or name == "prompt_template":
                given[name] = arguments[name]
            elif parameter.default is parameter.empty:
                given[name] = None  # the second and third prompts, which follow the first
        plain = {
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
            "do_classifier_free_guidance": False,
            "prompt": list(texts),
        }
        given |= {name: value for name, value in plain.items() if name in arguments}
        if given.get("image") is None:
            return family.text(family.parts(stock(**given), guided=False))
        # The pictures of an edit belong to one prompt.
        each = [family.text(stock(**{**given, "prompt": [one]})).positive[0] for one in texts]
        return Text(pad_sequence(each, batch_first=True))

    sampling = Sampling(
        prompts=prompts,
        tokenize=tokenize,
        images_per_prompt=images,
        prompt_count=count,
        guided=guided,
        text_tokens=text.positive.shape[1],
        encode=encode,
        clean=lambda source, like: clean_latents(pipe, family, source, like, sampling.latent_grid),
        sites=[] if run.installation is None else list(run.installation.sites),
    )
    edited = text
    for index, control in enumerate(run.controls):
        if "context" in control.points() and not control.idle:
            before, start = edited, time.perf_counter()
            edited = control.context(before, sampling)
            if edited is not before:
                sampling.report.add(index, control.name, "context", 0, None, time.perf_counter() - start)
    for branch, before_all, after_all in (
        ("cond", text.positive, edited.positive),
        ("uncond", text.negative, edited.negative),
    ):
        if before_all is not None and after_all is not None:
            sampling.appended[branch] = after_all.shape[1] - before_all.shape[1]
    return Sampler(run, sampling), outputs if edited is text else family.outputs(edited, outputs)
