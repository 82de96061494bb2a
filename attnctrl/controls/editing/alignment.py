"""Which tokens of an edited prompt correspond to which tokens of the source prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from attnctrl.errors import ControlError
from attnctrl.prompt import PromptTokens

Span = tuple[int, int]
WORD = re.compile(r"\w+|[^\w\s]")


def common(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """The pairs (i, j) of a longest common subsequence of `a` and `b`.

    Needleman and Wunsch's alignment with match 1, mismatch -1 and gap 0, as Prompt-to-Prompt uses it, is this: two
    gaps always beat a mismatch.
    """
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            same = 1 + best[i + 1][j + 1] if a[i] == b[j] else 0
            best[i][j] = max(same, best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j] and best[i][j] == 1 + best[i + 1][j + 1]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def words(prompt: str) -> list[tuple[str, Span]]:
    """The words and marks of a prompt in lower case, with their characters."""
    return [(m.group().lower(), m.span()) for m in WORD.finditer(prompt)]


def positions(tokens: PromptTokens, span: Span) -> list[int]:
    """The tokens that hold any character of `span`, counted from the encoder's own first one."""
    return [i for i, (a, b) in enumerate(tokens.spans[: tokens.limit - 1]) if a < span[1] and b > span[0] and a < b]


def aligned(source: PromptTokens, target: PromptTokens, count: int, edit: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The map (count, count) from the source's columns to the target's, and which columns it defines, bool (count,).

    Column t of the target's attention becomes the sum over s of map[s, t] times the source's column s. Words that
    both prompts have, in order, pass their attention on; so do the start, the end and the padding. edit "replace":
    words that differ do too, one for one, which needs equally many words; a word of several tokens shares its
    attention out evenly where the numbers of tokens differ. edit "refine": words that the source has not got keep
    their own attention. Raises ControlError for "replace" with different numbers of words.
    """
    ours, theirs = words(source.prompt), words(target.prompt)
    if edit == "replace":
        if len(ours) != len(theirs):
            raise ControlError(
                f'PromptToPrompt: edit "replace" needs prompts of equally many words, and "{source.prompt}" has '
                f'{len(ours)}, "{target.prompt}" {len(theirs)}: use "refine".'
            )
        pairs = [(i, i) for i in range(len(ours))]
    else:
        pairs = common([w for w, _ in ours], [w for w, _ in theirs])
    passed = torch.zeros(count, count)
    defined = torch.zeros(count, dtype=torch.bool)
    for i, j in pairs:
        from_, to = positions(source, ours[i][1]), positions(target, theirs[j][1])
        if not from_ or not to:
            continue  # beyond the encoder's window
        one_to_one = len(from_) == len(to)
        for k, s in enumerate(from_):
            for m, t in enumerate(to):
                if one_to_one and k != m:
                    continue
                passed[s, t] = 1.0 if one_to_one else 1 / len(to)
        defined[to] = True
    first = source.start is not None and target.start is not None
    if first:
        passed[0, 0], defined[0] = 1.0, True
    for t in range(target.end, count):
        passed[min(source.end + t - target.end, count - 1), t] = 1.0
        defined[t] = True
    return passed, defined
