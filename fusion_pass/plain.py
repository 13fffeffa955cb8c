"""Plain and causal sites on a GPU with cuDNN's attention: torch's own scaled_dot_product_attention is put in their place.

It is the kernel that the fused op would choose (`fusion_kernels.cudnn`), without the op's way through Python: at N = 1024 that
took longer than the kernel (one H200; 0.14 ms forward, where torch.compile with its own pattern for this took 0.09).
"""

from __future__ import annotations

from fusion_kernels import cudnn
from fusion_kernels.program import Program
from fusion_kernels.sdpa import Form, form

from .match import Match

__all__ = ["plain"]


def plain(match: Match, program: Program) -> Form | None:
    """The arguments of scaled_dot_product_attention that compute the site; None where a size is not known or does not suit."""
    found = form(program)
    if found is None or not cudnn.expresses(program) or match.dropout_p:
        return None
    if match.q.dtype not in cudnn.HALVES or not match.q.dtype == match.k.dtype == match.v.dtype:
        return None
    n, m, d, dv = match.q.shape[2], match.k.shape[2], match.q.shape[3], match.v.shape[3]
    if not all(size.is_Integer for size in (m, d, dv)) or not (n.is_Integer or not found.causal):
        return None
    return found if cudnn.fits(int(n) if n.is_Integer else -1, int(m), int(d), int(dv), found.causal) else None
