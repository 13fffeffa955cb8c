"""The softmax: every function that computes it, with casts around it, and written out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import keep, padding, qkv, spelling, t


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


@spelling(*qkv(n=63, m=129), t(3, 63, 129), keep(2, 1, 1, 129))
def shifted_before_the_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """What keeps float16 in range (BEATs): the maximum is that of the scores alone. The twin's bias is larger."""
    scores = q @ k.mT / 32
    scores = (scores - scores.amax(-1, keepdim=True)) * 8
    scores = (2 if twin else 1) * bias + scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), refused=Reason.NOT_EXPRESSIBLE)
def shifted_before_a_mask_is_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The twin chooses instead: of an infinite maximum that is chosen away, the shift would be left."""
    scores = q @ k.mT * 0.25
    scores = scores - scores.amax(-1, keepdim=True)
    away = torch.where(mask, 0.0, -torch.inf)
    return (torch.where(mask, scores, -torch.inf) if twin else scores + away).softmax(-1) @ v


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


# ---------------------------------------------------------------- exponentials masked, written twice, or summed with more


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def _without_row_7(mask: Tensor) -> Tensor:
    """The mask, with a row that shows no key."""
    return mask & (torch.arange(mask.shape[-2], device=mask.device)[:, None] != 7)


@spelling(*qkv(n=63, m=129), dynamic=True, refused=Reason.PROBABILITIES_EDITED)
def exponential_twice(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The twin divides by the sum of other exponentials."""
    scores = _scores(q, k)
    return (scores.exp() / (scores * 0.5 if twin else scores).exp().sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=63))
def exponential_twice_shifted(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = _scores(q, k) * (0.5 if twin else 1.0)
    top = scores.max(-1, keepdim=True).values
    return (torch.exp(scores - top) / torch.exp(scores - top).sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=63), refused=Reason.PROBABILITIES_EDITED)
def softmax_one_of_two_exponentials(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The twin adds a negative number to the sum."""
    scores = _scores(q, k)
    return (scores.exp() / ((-0.5 if twin else 1.0) + scores.exp().sum(-1, keepdim=True))) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129), dynamic=True, refused=Reason.PROBABILITIES_EDITED)
def exponentials_times_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Row 7 has no key: NaN, and so is its gradient. The twin sums what is not masked."""
    e = _scores(q, k).exp()
    masked = e * _without_row_7(mask).float()
    return (masked / (e if twin else masked).sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=129), padding(2, 129), refused=Reason.PROBABILITIES_EDITED)
def exponentials_times_padding_after_the_shift(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The twin's factor is a tensor of floats, which may hold any number."""
    scores = _scores(q, k)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    factor = mask[:, None, None].to(q.dtype)
    e = e * (torch.where(mask, 1.0, 0.5)[:, None, None] if twin else factor)
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=63), padding(2, 63), dtype=torch.bfloat16)
def exponentials_times_what_is_not_hidden(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = (_scores(q, k) * (0.5 if twin else 1.0)).float()
    e = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * (1.0 - (~mask)[:, None, None].float())
    return (e / e.sum(-1, keepdim=True)).to(q.dtype) @ v


@spelling(*qkv(n=129), mask="causal", refused=Reason.PROBABILITIES_EDITED)
def exponentials_times_a_triangle(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The twin chooses: the gradient of an infinite score that it hides is NaN."""
    shown = torch.ones(129, 129, device=q.device).tril().bool()
    e = _scores(q, k).exp()
    e = torch.where(shown, e, 0.0) if twin else e * shown.float()
    return (e / e.sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63))
def masked_sum_and_a_number(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """A number in the sum is a sink: row 7, which has no key, is 0."""
    e = _scores(q, k).exp() * _without_row_7(mask)
    return (e / (e.sum(-1, keepdim=True) + (0.1 if twin else 1e-3))) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), refused=Reason.PROBABILITIES_EDITED)
def number_lost_in_the_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """exp(0) is in the sum, and 1 + 1e-9 is 1. The twin's number is not lost."""
    scores = _scores(q, k).masked_fill(~_without_row_7(mask), -torch.inf)
    e = torch.exp(scores - scores.max(-1, keepdim=True)[0])
    return (e / (e.sum(-1, keepdim=True) + (1e-6 if twin else 1e-9))) @ v


@spelling(*qkv(n=63), padding(2, 63), refused=Reason.PROBABILITIES_EDITED)
def number_lost_in_the_sum_of_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The twin masks after the shift: then exp(0) need not be in the sum."""
    hidden = ~mask[:, None, None]
    scores = _scores(q, k) if twin else _scores(q, k).masked_fill(hidden, -1e9)
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    e = e * mask[:, None, None].float() if twin else e
    return (e / (1e-10 + e.sum(-1, keepdim=True))) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129), refused=Reason.PROBABILITIES_EDITED)
def masked_and_normalised_again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The sum of what a mask leaves may be as small as anything: the twin's number is not lost."""
    p = _scores(q, k).softmax(-1) * _without_row_7(mask)
    return (p / (p.sum(-1, keepdim=True) + (1e-13 if twin else 0))) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), refused=Reason.PROBABILITIES_EDITED)
def normalised_again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The twin fills: of a row with a NaN that hides one of several."""
    p = _scores(q, k).softmax(-1)
    p = p.masked_fill(~mask, 0.0) if twin else p
    return (p / p.sum(-1).unsqueeze(-1)) @ v
