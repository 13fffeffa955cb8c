"""Attention programs that came out wrong once, made short; the kernels' are in test_fuzz_kernels.py."""

from __future__ import annotations

from math import inf, nan
from textwrap import dedent, indent
from typing import Any

import pytest
import torch

from fuzz.inputs import Input
from fuzz.judge import check
from fuzz.programs import Written

ROW = (2, 2, 3, 16)


def qkv(shape: tuple[int, ...] = ROW, **of_q: Any) -> tuple[Input, ...]:
    return Input("q", shape, grad=True, **of_q), Input("k", shape, grad=True), Input("v", shape, grad=True)


def written(
    body: str, inputs: tuple[Input, ...], *, fused: bool = True, dynamic: bool = False, dtype: torch.dtype = torch.float32
) -> Written:
    lines = indent(dedent(body).strip() + "\n", "    ")
    source = f"def attention({', '.join(x.name for x in inputs)}):\n{lines}"
    return Written(source, inputs, dtype, fused, dynamic, "eager", 3, 0.0)


FOUND = {
    # torch leaves autocast on inside of an op: the products of queries that einsum multiplies in fp32 were rounded by it.
    "fp32 queries under autocast": written(
        """
        with torch.autocast('cpu', dtype=torch.bfloat16):
            s = F.softplus(torch.einsum('bhid,bhjd->bhij', q, k))
            out = torch.einsum('...qk,...kd->...qd', F.softmax(s, dim=-1), v)
        return out
        """,
        tuple(Input(name, (2, 3, 33, 1), grad=True, scale=4.0) for name in "qkv"),
    ),
    # The calls that are left of a composite one were put under autocast once more, which is off inside of it.
    "torch's own attention under autocast": written(
        """
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.125)
        return out
        """,
        (
            Input("q", (6, 17, 16), grad=True),
            Input("k", (6, 17, 16), scale=4.0),
            Input("v", (6, 17, 1), scale=4.0),
            Input("keep", (6, 17, 17), "keep", dtype=torch.bool, dead=True),
        ),
    ),
    # The scale of a composite call is a number of sizes that no node holds.
    "torch's own attention with a head dim that is dynamic": written(
        """
        q, k, v = q.unflatten(1, (1, 3)), k.unsqueeze(2), v.unsqueeze(2)
        keep = (keep > 0) & ~torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.expand(*q.shape[:-1], k.shape[-2]))
        """,
        (
            Input("q", (2, 3, 63, 40), grad=True),
            Input("k", (2, 1, 63, 40)),
            Input("v", (2, 1, 63, 40), grad=True),
            Input("keep", (2, 1, 1, 1, 63), "keep", dtype=torch.int64),
        ),
        dynamic=True,
    ),
    # The mean of a row that a mask hides in part is -inf: eager is NaN, the softmax of the unshifted scores is not.
    "a shift that is not finite": written(
        """
        s = (q @ k.mT).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -torch.inf)
        s = s - s.mean(-1, keepdim=True)
        e = torch.exp(s - s.amax(-1, keepdim=True))
        return (e / e.sum(-1, keepdim=True)) @ v
        """,
        qkv(),
        fused=False,
    ),
    # A shift that is a tensor of its own stays part of the score.
    "a shift by a tensor": written(
        """
        e = torch.exp(q @ k.mT - c)
        return (e / e.sum(-1, keepdim=True)) @ v
        """,
        (*qkv(), Input("c", (2, 1, 3, 1), grad=True)),
    ),
    # The rows of p @ v merge the heads of a group and the queries; the group is the longer axis, and k is expanded over it.
    "more heads in a group than queries": written(
        """
        q, k, v = q.unflatten(1, (1, 3)), k.unsqueeze(2), v.unsqueeze(2)
        return torch.einsum('...qk,...kd->...qd', (q @ k.mT).softmax(-1), v)
        """,
        (Input("q", (2, 3, 2, 40), grad=True), Input("k", (2, 1, 2, 40), grad=True), Input("v", (2, 1, 2, 40), grad=True)),
    ),
    # (s + 2) // 3, the size of a chunk, was read as the fraction s / 3 + 2 / 3.
    "chunks of a dynamic size": written(
        """
        q, k, v = (t.reshape(1, -1, 2, 72).transpose(1, 2) for t in x.chunk(3, dim=-1))
        return (q @ k.mT).softmax(-1) @ v
        """,
        (Input("x", (1, 16, 432), grad=True),),
        dynamic=True,
    ),
    # No index is negative: the mask folded to a constant, and the tensors behind it were captured but not read.
    "a capture that is not read": written(
        """
        j = torch.arange(3)
        s = (q @ k.mT) + slopes * (j - j[:, None])
        return torch.where(~(j < 0), -1e9, s).softmax(-1) @ v
        """,
        (*qkv(), Input("slopes", (2, 1, 1), grad=True)),
    ),
    # The term of a causal `where` has no rest, and took the bias that was added after it with it on the way to ATen.
    "added after a causal where": written(
        """
        i = torch.arange(3)
        return (torch.where(i[:, None] >= i, q @ k.mT, -torch.inf) + bias).softmax(-1) @ v
        """,
        (*qkv(), Input("bias", (1, 1, 1, 3))),
    ),
    # Three batch dims of one symbolic size: einsum reshapes by (s * s * s) // (s * s), which torch leaves as it is.
    "batch dims of one dynamic size": written(
        "return torch.matmul(torch.einsum('...qd,...kd->...qk', q, k).softmax(-1), v)",
        qkv((2, 2, 2, 5, 16)),
        dynamic=True,
    ),
    # Masked scores overflow in float16, and not in the fused op: the gradient of the factor is NaN in eager, 0 in float64.
    "scores past float16": written(
        """
        bias = torch.zeros(3, 3, dtype=q.dtype).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -65504.0)
        s = (q @ k.mT * 8 + bias).float() * c
        p = s.softmax(-1).to(v.dtype)
        return p @ v
        """,
        (*qkv(), Input("c", (2, 1, 1, 3), dtype=torch.float32, grad=True)),
        dtype=torch.float16,
    ),
    # The derivative of silu is g (a + b) in torch and g a + g b in the kernel: NaN for inf where a and b differ in sign.
    "an infinite gradient": written("return F.silu(q @ k.mT).softmax(-1) @ v", (*qkv()[:2], Input("v", ROW, poison=inf))),
    # ATen gives 0 to rows whose scores are all -inf, and without a mask to rows that are all NaN; softmax gives NaN.
    "scores of -inf": written("return (q.abs() @ -k.abs().mT).softmax(-1) @ v", qkv(poison=inf)),
    # torch's kernels give zeros for such a row, with a mask and without.
    "scores of -inf, in one call": written("return F.scaled_dot_product_attention(q.abs(), -k.abs(), v)", qkv(poison=inf)),
    # lse was NaN in a row with +inf, and so was dv at all of its keys; of exp(s - logsumexp(s)) eager has NaN at that key alone.
    "a score of inf": written(
        """
        i = torch.arange(5)
        s = torch.einsum('bqd,bkd->bqk', q, k * -0.3).masked_fill((i[:, None] >= i) == 0, -torch.inf)
        return torch.exp(s - torch.logsumexp(s, 2, keepdim=True)) @ v
        """,
        qkv((3, 5, 40), poison=inf),
    ),
    "a score of inf, softmax": written("return (q @ (k * -0.3).mT).softmax(-1) @ v", qkv((3, 5, 40), poison=inf)),
    "scores of NaN": written("return (q @ k.mT).softmax(-1) @ v", qkv(poison=nan)),
}


@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND)
def test_found(program: Written) -> None:
    check(program)
