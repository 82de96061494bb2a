"""What a run remembers for a method by which subjects' latents look at their references, from some layer on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnctrl.control import Where
from attnctrl.controls.subjects.owners import Owners, late_sites
from attnctrl.controls.subjects.rows import References
from attnctrl.references import Subject
from attnctrl.sampling import Sampling


@dataclass
class Looking:
    """rows: of the references. owners: whose each latent is. names: of the sites at which pictures look."""

    rows: References
    owners: Owners
    names: frozenset[str]

    @classmethod
    def begin(
        cls, sampling: Sampling, subjects: Sequence[Subject], where: Where, from_layer: float, who: str, **how: Any
    ) -> Looking:
        """from_layer: share of the sites, in order, that are left alone. who: the method, for its sentences.
        how: as `Owners.begin` takes it. Raises ControlError as it and `References.of` do.
        """
        rows = References.of(sampling, subjects, who)
        owners = Owners.begin(sampling, subjects, rows.scenes, who, **how)
        return cls(rows, owners, frozenset(site.name for site in late_sites(sampling, where, from_layer)))
