"""Plain and causal sites on a GPU with cuDNN's attention: torch's own scaled_dot_product_attention is put in their place.

It is the kernel that the fused op would choose (`fusion_kernels.cudnn`), without the op's way through Python: at N = 1024 that
took longer than the kernel (one H200; 0.14 ms forward, where torch.compile with its own pattern for this took 0.09).

Dropout goes there in training, and where cuDNN drops at exactly the rate that is asked for (`cudnn.drops`). Its forward takes 1.3
times the time of the Triton kernel, its backward 0.8 times, a training step 0.9 times (one H200, bf16, B, H, N, D = 4, 16, 4096,
128). The mask comes from torch's default generator, as that of `F.dropout` does. A checkpointed region that is compiled is left
to the op: it runs its forward twice, and would gain nothing; and there torch gives the call a generator of its own on a GPU,
which `torch.manual_seed` does not reach.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from fusion_kernels import cudnn
from fusion_kernels.program import Program
from fusion_kernels.sdpa import Form, form
from torch._functorch import config

from .match import Match

__all__ = ["plain"]

# Whether torch itself leaves cuDNN where the batch is too large for it, as it does since April 2026 (pytorch#180718).
CHECKS_BATCH = torch.__version__ >= (2, 13)  # pyright: ignore[reportOperatorIssue]


def plain(match: Match, program: Program, device: torch.device, *, trained: bool, body: bool, site: int) -> Form | None:
    """The arguments of scaled_dot_product_attention that compute the site; None where a size is not known or does not suit.

    Args:
        trained: whether q, k or v needs a gradient.
        body: whether it stands in the body of a higher-order op, which a checkpointed region is.
        site: its number in the graph, bodies of higher-order ops included.
    """
    found = form(program)
    if found is None or not cudnn.expresses(program):
        return None
    if match.dropout_p and not (trained and not body and _drops(match, found, device)):
        return None
    if match.q.dtype not in cudnn.HALVES or not match.q.dtype == match.k.dtype == match.v.dtype:
        return None
    (b, h, n, d), m, dv = match.q.shape, match.k.shape[2], match.v.shape[3]
    if not all(size.is_Integer for size in (m, d, dv)) or not (n.is_Integer or not found.causal):
        return None
    if not (CHECKS_BATCH or b.is_Integer and h.is_Integer):
        return None
    b, h, n = (int(size) if size.is_Integer else -1 for size in (b, h, n))
    if not cudnn.fits(b, h, n, int(m), int(d), int(dv), found.causal):
        return None
    return _apart(found, site) if match.dropout_p else found


def _drops(match: Match, found: Form, device: torch.device) -> bool:
    """Whether the dropout may go there too: cuDNN has none for a single query, and `_apart` tells sites apart by their scale.

    Where the user has torch compute more again in the backward, it may do so with attention, and draws another mask then: its
    partitioner bans flash attention from it by name, and dropout, but not cuDNN's.
    """
    if config.aggressive_recomputation or config.activation_memory_budget < 1:
        return False
    n = match.q.shape[2]
    return cudnn.drops(match.dropout_p, device) and bool(n.is_Integer and n > 1) and found.scale != 0


def _apart(found: Form, site: int) -> Form:
    """The form as no other site of the graph has it: ``scale (1 + site 2^-52)``, which fp32 does not see.

    torch merges calls that are equal (`fx_graph_cse`). It spares `dropout`, but not scaled_dot_product_attention: two attentions
    over the same tensors would get one mask, where eager draws two.
    """
    return replace(found, scale=found.scale * (1 + site * 2.0**-52))
