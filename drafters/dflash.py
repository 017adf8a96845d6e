"""DFlash: the block-parallel backbone and the frozen head alone, trained on cross-entropy (specs: "DFlash and DSpark").

Everything but its defaults is DSpark's without a Markov and a confidence head; the target's distribution is computed
for metrics, without gradient.
"""

from __future__ import annotations

from drafters.dspark import DSparkDrafter


class DFlashDrafter(DSparkDrafter):
    """DFlash on any family; its settings have no heads."""

    algorithm = "dflash"
