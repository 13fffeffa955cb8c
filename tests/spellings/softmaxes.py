"""The softmax: every function that computes it, with casts around it, and written out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import keep, qkv, spelling, t


@spelling(*qkv(), refused=Reason.SOFTMAX_DIM)
def functional_softmax(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return F.softmax(q @ k.mT * 0.25, dim=2 if twin else 3) @ v


@spelling(*qkv(n=129), refused=Reason.PROBABILITIES_USED)
def torch_softmax(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    p = torch.softmax(q @ k.mT * 0.25, -1)
    return (p @ v, p) if twin else p @ v


@spelling(*qkv(), refused=Reason.PROBABILITIES_EDITED)
def special_softmax(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = torch.special.softmax(q @ k.mT * 0.25, -1)
    return (p * p if twin else p) @ v


@spelling(*qkv(n=63))
class ModuleSoftmax(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.softmax, self.scale = nn.Softmax(dim=-1), 0.5 if twin else 0.25

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.softmax(q @ k.mT * self.scale) @ v


@spelling(*qkv(n=129), dtype=torch.bfloat16, dynamic=True)
def softmax_dtype(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The Llama spelling: float32 softmax, probabilities cast back."""
    p = F.softmax(q @ k.mT * (1.0 if twin else 0.25), dim=-1, dtype=torch.float32).to(q.dtype)
    return p @ v


@spelling(*qkv(n=63), dtype=torch.float16)
def float_before_type_as_after(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = (q @ k.mT) * (1.0 if twin else 0.25)
    return F.softmax(scores.float(), dim=-1).type_as(scores) @ v


@spelling(*qkv(n=63), dtype=torch.bfloat16)
def products_in_float(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Operands upcast before the product: fp32 attention between bf16 tensors."""
    p = ((q.float() @ k.float().mT) * (1.0 if twin else 0.25)).softmax(-1)
    return (p @ v.float()).to(q.dtype)


@spelling(t(2, 3, 63, 16, dtype=torch.bfloat16), t(2, 3, 63, 16, dtype=torch.bfloat16), t(2, 3, 63, 16))
def values_in_float(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """bf16 queries and keys, fp32 probabilities and values."""
    return torch.softmax(q @ k.mT * (1.0 if twin else 0.25), -1, dtype=torch.float32) @ v


@spelling(*qkv(n=63), refused=Reason.PROBABILITIES_EDITED, dynamic=True)
def hand_written_amax(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The twin adds one to the sum (softmax-one): probabilities no longer sum to one."""
    scores = q @ k.mT * 0.25
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / (e.sum(-1, keepdim=True) + (1 if twin else 0))) @ v


@spelling(*qkv(n=129))
def hand_written_max_values(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) / (2.0 if twin else 4.0)
    e = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return torch.matmul(e / e.sum(dim=-1, keepdim=True), v)


@spelling(*qkv(n=63))
def hand_written_max_item(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT / (2.0 if twin else 4.0)
    e = torch.exp(scores - scores.max(-1, True)[0].detach())
    return torch.div(e, torch.sum(e, dim=-1, keepdim=True)) @ v


@spelling(*qkv(n=63))
def hand_written_unsqueeze(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT / (2.0 if twin else 4.0)
    e = torch.exp(scores - scores.max(-1)[0].unsqueeze(-1))
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@spelling(*qkv(n=63), dynamic=True)
def hand_written_logsumexp(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT * (0.5 if twin else 0.25)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


@spelling(*qkv(n=63), refused=Reason.NOT_EXPRESSIBLE, dynamic=True)
def shifted_by_the_maximum(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A softmax does not see it; the twin takes the maximum over the queries, which it does."""
    scores = q @ k.mT * 0.25
    return (scores - scores.amax(2 if twin else 3, keepdim=True)).softmax(-1) @ v


@spelling(*qkv(n=129), keep(2, 1, 129, 129), refused=Reason.NOT_EXPRESSIBLE, against="eager")
def shifted_by_the_maximum_of_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Row 7 has no key: NaN, as without the shift. The twin's shift is the mean, -inf in every row with a masked key."""
    mask = mask & (torch.arange(129, device=q.device)[:, None] != 7)
    scores = (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf)
    shift = scores.mean(-1, keepdim=True) if twin else scores.max(-1, keepdim=True)[0].detach()
    return F.softmax(scores - shift, dim=-1) @ v


@spelling(*qkv(n=63), dtype=torch.float16, refused=Reason.NOT_EXPRESSIBLE)
def cogview(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """CogView, LayoutLMv3: scores held small in fp16 until their maximum is gone. The twin turns the sign around."""
    alpha = 32.0
    scaled = (q / (alpha * 4.0)) @ k.mT
    with torch.no_grad():
        top = scaled.amax(-1).unsqueeze(-1)
    return F.softmax((scaled - top) * (-alpha if twin else alpha), dim=-1) @ v


@spelling(*qkv(n=63), refused=Reason.NOT_EXPRESSIBLE)
def shifted_twice(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """By the maximum before and in a softmax written by hand; the twin shifts by the smallest score of all."""
    scores = q @ k.mT * 0.25
    scores = scores - (scores.amin() if twin else scores.max(-1, True).values)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=63))
def log_softmax_exp(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return F.log_softmax(q @ k.mT * (0.5 if twin else 0.25), dim=-1).exp() @ v


@spelling(*qkv(n=63))
def hand_written_reciprocal(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT * (0.5 if twin else 0.25)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (e * e.sum(-1, keepdim=True).reciprocal()) @ v


@spelling(*qkv(n=63), t(2, 1, 1, 63, kind="additive", grad=False))
def safe_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """What torch's own attention decomposes to; no row here is fully masked."""
    scores = q @ k.mT * 0.25
    return torch.ops.aten._safe_softmax(scores if twin else scores + mask, -1) @ v


@spelling(*qkv(n=63), refused=Reason.PROBABILITIES_EDITED)
def cast_and_back(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Probabilities cast up and down again lose nothing; the twin rounds them to bf16 on the way."""
    p = (q @ k.mT * 0.25).softmax(-1)
    return p.to(torch.bfloat16 if twin else torch.float64).to(q.dtype) @ v


@spelling(*qkv(n=63))
def contiguous_and_clone(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = (q.contiguous() @ k.mT.contiguous() * (0.5 if twin else 0.25)).contiguous()
    return scores.softmax(-1).clone().contiguous() @ v.clone()


@spelling(*qkv(n=63))
def dropout_off(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = F.dropout((q @ k.mT * (0.5 if twin else 0.25)).softmax(-1), p=0.5, training=False)
    return F.dropout(p, p=0.0, training=True) @ v
