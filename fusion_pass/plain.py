"""Plain and causal sites on a GPU with cuDNN's attention: torch's own scaled_dot_product_attention is put in their place.

It is the kernel that the fused op would choose (`fusion_kernels.cudnn`), without the op's way through Python: at N = 1024 that
took longer than the kernel (one H200; 0.14 ms forward, where torch.compile with its own pattern for this took 0.09).

Dropout stays with the op, though torch.compile's own pattern takes cuDNN for it. On one H200 a training step through cuDNN took
0.9 times as long (p = 0.1, full attention, N = 4096), but its masks are not what eager draws: of 10^5 draws for each row and each
key, some of 512 had a mean 6 to 8 standard deviations from 1 - p, as where draws are shared. Besides, some kernels of cuDNN round
the rate to 1/16 (pytorch#174245), and torch merges equal calls of scaled_dot_product_attention, random or not (`fx_graph_cse`).
"""

from __future__ import annotations

import torch
from fusion_kernels import cudnn
from fusion_kernels.program import Program
from fusion_kernels.sdpa import Form, form

from .match import Match

__all__ = ["plain"]

# Whether torch itself leaves cuDNN where the batch is too large for it, as it does since April 2026 (pytorch#180718).
CHECKS_BATCH = torch.__version__ >= (2, 13)  # pyright: ignore[reportOperatorIssue]


def plain(match: Match, program: Program) -> Form | None:
    """The arguments of scaled_dot_product_attention that compute the site; None where a size is not known or does not suit."""
    found = form(program)
    if found is None or not cudnn.expresses(program) or match.dropout_p:
        return None
    if match.q.dtype not in cudnn.HALVES or not match.q.dtype == match.k.dtype == match.v.dtype:
        return None
    (b, h, n, d), m, dv = match.q.shape, match.k.shape[2], match.v.shape[3]
    if not all(size.is_Integer for size in (m, d, dv)) or not (n.is_Integer or not found.causal):
        return None
    if not (CHECKS_BATCH or b.is_Integer and h.is_Integer):
        return None
    b, h, n = (int(size) if size.is_Integer else -1 for size in (b, h, n))
    return found if cudnn.fits(b, h, n, int(m), int(d), int(dv), found.causal) else None
