"""Every way to write attention that the pass must see through: one table, filled by the modules of this package."""

from __future__ import annotations

# each fills the table
from spellings import (  # noqa: F401
    biases,
    causal,
    contexts,
    joins,
    layouts,
    library,
    masks,
    products,
    scales,
    sinks,
    softmaxes,
    structures,
    sums,
    weights,
)
from spellings.table import SPELLINGS, Spelling, T, make_input, make_inputs

__all__ = ["SPELLINGS", "Spelling", "T", "make_input", "make_inputs"]
