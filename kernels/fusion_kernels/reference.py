"""What the op means, in torch, every score at once: to be read, and to hold everything else to.

    s = q k^T                          raw scores, no implicit scale
    x = program(s; b, h, q, k, ...)
    p = softmax(x) over the keys       rows that are all -inf, or hold +inf, are NaN, as in eager
    o = dropout(p) v
    lse = log2(sum(exp(x)))            base 2: what the kernels exponentiate in; p = 2^(x log2(e) - lse), NaNs included

With a sink z, p = softmax([x, z]) without its last column, and lse = log2(exp(z) + sum(exp(x))). With a weight,
o = w(dropout(p)) v.

Backward, with do = d(loss)/do:

    dv = dropout(p)^T do
    dp = dropout(do v^T)
    dx = p (dp - delta),               delta = sum_k p dp = sum_d do o
    ds, dcaptures = the program's own gradient of dx
    dq = ds k,  dk = ds^T q
    dz = -p_sink delta                 the sink has no value: its dp is 0

With a weight, dv = w(dropout(p))^T do, dp = dropout(w'(do v^T)), and delta is what it was: w is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from .derivative import vjp
from .evaluate import Box, Environment, evaluate, scatter
from .philox import keep_mask
from .program import Program

__all__ = [
    "LOG2E", "as_tensor", "compute_dtype", "dense", "dense_backward", "dropout_factor", "own_dtypes", "scatter_sink",
    "sink_over", "unweighted", "weighted",
]  # fmt: skip

LOG2E = math.log2(math.e)
P = ParamSpec("P")
T = TypeVar("T")


def own_dtypes(fn: Callable[P, T]) -> Callable[P, T]:
    """`fn`, whose first argument is a tensor, with autocast off: torch leaves a model's autocast on inside of an op of ours."""

    @wraps(fn)
    def exact(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.autocast(args[0].device.type, enabled=False):  # pyright: ignore[reportAttributeAccessIssue]
            return fn(*args, **kwargs)

    return exact


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@own_dtypes
def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    params: Sequence[int],
    program: Program,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: every score at once, differentiable by torch's own autograd.

    Args:
        q: (B, H, N, D). k: (B, Hkv, M, D). v: (B, Hkv, M, Dv), H a multiple of Hkv.
        captures: the tensors that `program` loads. params: its integer parameters.
        dropout_p: probability to drop. seed: 0-d int64, needed with dropout.

    Returns:
        out (B, H, N, Dv) in v's dtype; lse (B, H, N), base 2, fp32 (fp64 for fp64 inputs).
    """
    env = _dense_environment(q, k, captures, params)
    p, _, lse = _dense_softmax(env, program)
    if dropout_p:
        p = p * dropout_factor(env.box, dropout_p, seed, env)
    p = weighted(program, p, env)
    return (p @ _grouped(v, q.shape[1], env.dtype)).to(v.dtype), lse


@own_dtypes
def dense_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    params: Sequence[int],
    program: Program,
    dropout_p: float,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dcaptures: Sequence[torch.Tensor | None],
) -> None:
    """The definition of the gradients; arguments as in `tiled.tiled_backward`."""
    env = _dense_environment(q, k, captures, params)
    heads, kv_heads, dtype = q.shape[1], k.shape[1], env.dtype
    do = do.to(dtype)
    p, p_sink, _ = _dense_softmax(env, program)
    keep = dropout_factor(env.box, dropout_p, seed, env) if dropout_p else torch.ones((), dtype=dtype, device=q.device)
    wanted = tuple(i for i, need in enumerate(needs) if need)
    dp = keep * unweighted(program, p * keep, do @ _grouped(v, heads, dtype).mT, wanted, dcaptures, env)
    delta = (p * dp).sum(-1, keepdim=True)
    delta = delta if p_sink is None else delta + p_sink * 0
    env.grad = p * (dp - delta)
    gradient = vjp(program, wanted)
    if p_sink is not None and wanted:
        scatter_sink(program, -p_sink * delta, wanted, dcaptures, env)
    for load, g in gradient.loads:
        into = dcaptures[load.attr]  # type: ignore[index]
        assert into is not None
        scatter(load, as_tensor(evaluate([g], env)[0], env), into, env)
    ds = as_tensor(evaluate([gradient.dscore], env)[0], env).expand(p.shape)
    dq.copy_(ds @ _grouped(k, heads, dtype))
    dk.copy_((ds.mT @ q.to(dtype)).unflatten(1, (kv_heads, -1)).sum(2))
    dv.copy_((weighted(program, p * keep, env).mT @ do).unflatten(1, (kv_heads, -1)).sum(2))


def _grouped(t: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values repeated for each query head, in the compute dtype."""
    return t.to(dtype).repeat_interleave(heads // t.shape[1], 1) if t.shape[1] != heads else t.to(dtype)


def as_tensor(value: object, env: Environment) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=env.dtype, device=env.device)


def _dense_environment(q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor], params: Sequence[int]) -> Environment:
    (batch, heads, n, _), m = q.shape, k.shape[2]
    dtype = compute_dtype(q.dtype)
    score = q.to(dtype) @ _grouped(k, heads, dtype).mT
    sizes = {"B": batch, "H": heads, "N": n, "M": m}
    return Environment(Box((0, batch), (0, heads), (0, n), (0, m)), sizes, captures, params, dtype, q.device, score=score)


def _dense_softmax(env: Environment, program: Program) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Probabilities (B, H, N, M), the sink's (B, H, N, 1) if there is one, and base-2 log-sum-exp (B, H, N)."""
    assert env.score is not None
    x = as_tensor(evaluate([program.root], env)[0], env).expand(env.score.shape)
    if program.sink is not None:
        both = torch.cat([x, sink_over(program, env).expand(*x.shape[:3], 1)], -1)
        if not program.zero_rows:
            both = both.masked_fill((x == -math.inf).all(-1, keepdim=True), math.nan)
        p, lse = _columns(both, program)
        return p[..., :-1], p[..., -1:], lse
    p, lse = _columns(x, program)
    if not program.zero_rows:
        return p, None, lse
    empty = lse == -math.inf
    return p.masked_fill(empty.unsqueeze(-1), 0.0), None, lse.masked_fill(empty, math.inf)


def _columns(x: torch.Tensor, program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax of x over its last dim, and its base-2 log-sum-exp, as the program has rows with +inf."""
    p, lse = torch.softmax(x, -1), torch.logsumexp(x.detach(), -1)
    infinite = lse == math.inf
    if program.inf_rows:
        return torch.where(infinite.unsqueeze(-1), torch.exp(x - lse.unsqueeze(-1)), p), lse * LOG2E
    return p, lse.masked_fill(infinite, math.nan) * LOG2E


def sink_over(program: Program, env: Environment) -> torch.Tensor:
    """The sink of `program` over the rows of a box, (b, h, q, 1) or what broadcasts to it."""
    assert program.sink is not None
    return as_tensor(evaluate([program.sink], env)[0], env)


def scatter_sink(
    program: Program,
    dz: torch.Tensor,
    wanted: tuple[int, ...],
    dcaptures: Sequence[torch.Tensor | None],
    env: Environment,
) -> None:
    """Adds what the cotangent of the sink, (b, h, q, 1), gives the captures that it reads."""
    assert program.sink_program is not None
    rows = replace(env, box=replace(env.box, k=(0, 1)), score=None, grad=dz, values={})
    for load, gradient in vjp(program.sink_program, wanted).loads:
        into = dcaptures[load.attr]  # type: ignore[index]
        assert into is not None
        scatter(load, as_tensor(evaluate([gradient], rows)[0], rows), into, rows)


def weighted(program: Program, p: torch.Tensor, env: Environment) -> torch.Tensor:
    """What the values are multiplied with: the weight of `program` applied to `p`, over the box of `env`."""
    if program.weight is None:
        return p
    return as_tensor(evaluate([program.weight], _of_probabilities(env, p))[0], env).expand(p.shape)


def unweighted(
    program: Program,
    p: torch.Tensor,
    dp: torch.Tensor,
    wanted: tuple[int, ...],
    dcaptures: Sequence[torch.Tensor | None],
    env: Environment,
) -> torch.Tensor:
    """The cotangent of `p`, given that of ``weighted(p)``; adds what the weight gives the captures that it reads."""
    if program.weight_program is None:
        return dp
    gradient, env = vjp(program.weight_program, wanted), _of_probabilities(env, p, dp)
    for load, g in gradient.loads:
        into = dcaptures[load.attr]  # type: ignore[index]
        assert into is not None
        scatter(load, as_tensor(evaluate([g], env)[0], env), into, env)
    found = as_tensor(evaluate([gradient.dscore], env)[0], env)
    return found if found.shape == p.shape else found.expand(p.shape).clone()  # a weight of 0, whatever p


def _of_probabilities(env: Environment, p: torch.Tensor, grad: torch.Tensor | None = None) -> Environment:
    """The box of `env` for a weight, whose ``score`` is the probability. What reads none is not computed again."""
    known = {node: value for node, value in env.values.items() if not node.depends_on("score", "grad")}
    return replace(env, score=p, grad=grad, values=known)


def dropout_factor(box: Box, p: float, seed: torch.Tensor | None, env: Environment) -> torch.Tensor:
    """What probabilities are multiplied with: 0 or 1 / (1 - p), over the box."""
    assert seed is not None
    if p >= 1:
        return torch.zeros((), dtype=env.dtype, device=env.device)
    batches, heads = (torch.arange(*r, device=env.device) for r in (box.b, box.h))
    row = batches.view(-1, 1) * env.sizes["H"] + heads
    return keep_mask(seed, p, row, box.q, box.k).to(env.dtype) / (1 - p)
