"""The reference against float64 eager attention written by hand, and tiled against dense, on sizes that divide nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from fusion_kernels import reference, tiled
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, param

B_, H_, Q, K = (index(n) for n in "bhqk")
LOWEST = torch.finfo(torch.float32).min
SIZES = [(1, 1), (63, 129), (197, 197), (129, 63), (1, 197)]


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


SCALED = op("mul", SCORE, 0.25)
CAUSAL = op("le", K, Q)
Make = Callable[[int, int, torch.Generator], "list[torch.Tensor]"]


def none(n: int, m: int, g: torch.Generator) -> list[torch.Tensor]:
    return []


def bias(n: int, m: int, g: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(4, n, m, dtype=torch.float64, generator=g)]


def padding(n: int, m: int, g: torch.Generator) -> list[torch.Tensor]:
    return [torch.rand(2, m, generator=g) < 0.7]


READ_BIAS = load(0, "float", [H_, Q, K])
READ_PADDING = load(0, "bool", [B_, K])

PROGRAMS: dict[str, tuple[Program, Make]] = {
    "plain": (Program(SCALED), none),
    "causal": (Program(op("where", CAUSAL, SCALED, -math.inf)), none),
    "causal, lowest added": (Program(op("add", SCALED, op("where", CAUSAL, 0.0, LOWEST))), none),
    "causal, offset": (Program(op("where", op("le", K, op("add", Q, param(0))), SCALED, -math.inf), params=1), none),
    "causal, nothing seen": (Program(op("where", op("lt", K, op("sub", Q, 70)), SCALED, -1e9)), none),
    "causal, none": (Program(op("where", op("lt", K, op("sub", Q, 70)), SCALED, -math.inf)), none),
    "window": (Program(op("where", op("and", CAUSAL, op("gt", K, op("sub", Q, 9))), SCALED, -math.inf)), none),
    "softcap": (Program(op("where", CAUSAL, op("mul", op("tanh", op("div", SCALED, 5.0)), 5.0), -1e9)), none),
    "bias": (Program(op("add", SCALED, READ_BIAS), (Capture("float", 3),)), bias),
    "padding": (Program(op("where", READ_PADDING, SCALED, -math.inf), (Capture("bool", 2),)), padding),
    "padding, lowest": (Program(op("where", READ_PADDING, SCALED, LOWEST), (Capture("bool", 2),)), padding),
    "causal padding": (
        Program(op("where", op("and", CAUSAL, READ_PADDING), SCALED, -1e4), (Capture("bool", 2),)),
        lambda n, m, g: [torch.arange(m).expand(2, m) >= torch.tensor([[0], [m // 2]])],
    ),
    "causal padding, lowest": (
        Program(op("where", op("and", CAUSAL, READ_PADDING), SCALED, LOWEST), (Capture("bool", 2),)),
        lambda n, m, g: [torch.arange(m).expand(2, m) >= torch.tensor([[0], [m // 2]])],
    ),
    "relative": (
        Program(op("add", SCALED, load(0, "float", [H_, op("add", op("sub", K, Q), param(0))])), (Capture("float", 2),), 1),
        lambda n, m, g: [torch.randn(4, n + m, dtype=torch.float64, generator=g)],
    ),
    "alibi": (
        Program(op("add", SCALED, op("mul", load(0, "float", [H_]), op("to_float", op("sub", K, Q)))), (Capture("float", 1),)),
        lambda n, m, g: [torch.rand(4, dtype=torch.float64, generator=g) / 10],
    ),
    "temperature": (
        Program(op("mul", SCORE, load(0, "float", [])), (Capture("float", 0),)),
        lambda n, m, g: [torch.rand((), dtype=torch.float64, generator=g)],
    ),
    "score not read": (Program(READ_BIAS, (Capture("float", 3),)), bias),
    "constant": (Program(const(0.0)), none),
}


class Case:
    def __init__(
        self, name: str, n: int, m: int, kv_heads: int = 4, d: int = 16, dv: int = 8, dtype: torch.dtype = torch.float64
    ) -> None:
        g = torch.Generator().manual_seed(n * 1000 + m)
        self.program, make = PROGRAMS[name]
        self.q = torch.randn(2, 4, n, d, dtype=torch.float64, generator=g).to(dtype)
        self.k = torch.randn(2, kv_heads, m, d, dtype=torch.float64, generator=g).to(dtype)
        self.v = torch.randn(2, kv_heads, m, dv, dtype=torch.float64, generator=g).to(dtype)
        self.do = torch.randn(2, 4, n, dv, dtype=torch.float64, generator=g).to(dtype)
        self.captures = [c.to(dtype) if c.is_floating_point() else c for c in make(n, m, g)]
        self.params = [n if name == "relative" else -3] * self.program.params
        self.needs = [c.is_floating_point() for c in self.captures]
        self.dropout_p, self.seed = 0.0, None

    def autograd(self) -> list[torch.Tensor]:
        """out, dq, dk, dv, captures' gradients, lse: the definition, differentiated by torch."""
        leaves = [t.clone().requires_grad_() for t in (self.q, self.k, self.v)]
        own = [c.clone().requires_grad_(need) for c, need in zip(self.captures, self.needs, strict=True)]
        out, lse = reference.dense(*leaves, own, self.params, self.program, self.dropout_p, self.seed)
        wanted = [*leaves, *(c for c in own if c.requires_grad)]
        found = torch.autograd.grad(out, wanted, self.do, allow_unused=True)
        return [out.detach(), *(torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)), lse]

    def run(self, forward: Callable, backward: Callable) -> list[torch.Tensor]:
        wide = reference.compute_dtype(self.q.dtype)
        out = torch.full((*self.q.shape[:3], self.v.shape[3]), 7.0, dtype=self.v.dtype)
        lse = torch.full(self.q.shape[:3], 7.0, dtype=wide)
        arguments = (self.q, self.k, self.v, self.captures, self.params, self.program, self.dropout_p, self.seed, out, lse)
        forward(*arguments)
        grads = [torch.full_like(t, 7.0) for t in (self.q, self.k, self.v)]
        sums = [torch.zeros_like(c, dtype=wide) if need else None for c, need in zip(self.captures, self.needs, strict=True)]
        backward(self.do, *arguments, self.needs, *grads, sums)
        return [out, *grads, *(s for s in sums if s is not None), lse]

    def tiles(self) -> list[torch.Tensor]:
        return self.run(tiled.tiled_forward, tiled.tiled_backward)

    def dense(self) -> list[torch.Tensor]:
        def forward(*a: object) -> None:
            out, lse = reference.dense(*a[:8])  # type: ignore[arg-type]
            a[8].copy_(out)  # type: ignore[attr-defined]
            a[9].copy_(lse)  # type: ignore[attr-defined]

        return self.run(forward, reference.dense_backward)


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.fixture(params=["one tile", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small tiles":
        monkeypatch.setattr(tiled, "TILE", 32 * 48)
        monkeypatch.setattr(tiled, "ROWS", 32)
        monkeypatch.setattr(tiled, "KEYS", 48)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_tiled_is_dense_is_autograd(name: str, n: int, m: int, tiles: None) -> None:
    for kv_heads in (4, 2):
        case = Case(name, n, m, kv_heads)
        expected = case.autograd()
        same(case.dense(), expected)
        same(case.tiles(), expected)


def test_dense_is_attention_written_by_hand() -> None:
    case = Case("causal", 63, 129, kv_heads=2)
    k, v = (t.repeat_interleave(2, 1) for t in (case.k, case.v))
    x = (case.q @ k.mT * 0.25).masked_fill(torch.ones(63, 129, dtype=torch.bool).triu(1), -math.inf)
    out, *_, lse = case.autograd()
    same([out, lse], [torch.softmax(x, -1) @ v, torch.logsumexp(x, -1) / math.log(2)])


@pytest.mark.parametrize("name", ["plain", "causal", "window", "bias", "causal padding, lowest"])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_the_same_whatever_the_tiles(name: str, p: float, tiles: None) -> None:
    case = Case(name, 63, 129, kv_heads=2)
    case.dropout_p, case.seed = p, torch.tensor(987654321012)
    expected = case.autograd()
    same(case.dense(), expected)
    same(case.tiles(), expected)
    other = Case(name, 63, 129, kv_heads=2)
    other.dropout_p, other.seed = p, torch.tensor(5)
    assert p == 1.0 or not torch.equal(other.tiles()[0], expected[0])


def test_dropout_keeps_the_mean() -> None:
    q = torch.zeros(4, 4, 64, 4)
    v = torch.ones(4, 4, 128, 4)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    arguments = (q, torch.zeros_like(v), v, [], [], Program(SCORE), 0.25, torch.tensor(3), out, lse)
    tiled.tiled_forward(*arguments)
    rows = out[..., 0]  # each the mean of 128 kept or dropped values, worth 4 / 3 or 0: variance p / (1 - p) / 128
    deviation = (0.25 / 0.75 / 128) ** 0.5
    assert abs(rows.mean().item() - 1) < 5 * deviation / rows.numel() ** 0.5
    assert abs(rows.std().item() / deviation - 1) < 0.15


@pytest.mark.parametrize("fill", [-math.inf, -1e4, -1e9, LOWEST])
@pytest.mark.parametrize("style", ["where", "add"])
def test_rows_without_a_key(fill: float, style: str, tiles: None) -> None:
    """All -inf: NaN. A finite fill: every key counts alike, and so it does in the gradient."""
    hide = op("not", READ_PADDING)
    root = op("where", hide, fill, SCALED) if style == "where" else op("add", SCALED, op("where", hide, fill, 0.0))
    for causal in (False, True):
        case = Case("padding", 63, 129)
        case.program = Program(op("where", CAUSAL, root, fill) if causal else root, (Capture("bool", 2),))
        case.captures = [torch.arange(129).expand(2, 129) >= torch.tensor([[129], [20]])]
        expected = case.autograd()
        same(case.tiles(), expected)
        if fill == -math.inf:
            assert bool(expected[0][0].isnan().all())
        elif style == "where":
            torch.testing.assert_close(expected[0][0], case.v[0].mean(1, keepdim=True).expand(4, 63, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "causal", "bias", "alibi", "padding, lowest", "causal, nothing seen"])
def test_as_close_to_float64_as_eager(name: str, dtype: torch.dtype, tiles: None) -> None:
    case = Case(name, 63, 129, dtype=dtype)
    wide = Case(name, 63, 129, dtype=dtype)
    for field in ("q", "k", "v", "do"):
        setattr(wide, field, getattr(wide, field).double())
    wide.captures = [c.double() if c.is_floating_point() else c for c in wide.captures]
    exact, eager, found = wide.autograd()[:-1], case.autograd()[:-1], case.tiles()[:-1]
    unit = torch.finfo(dtype).eps
    for x, e, f in zip(exact, eager, found, strict=True):
        ours, theirs = ((t.double() - x).abs().max().item() for t in (f, e))
        # an ulp of the largest value: where eager happens to round every element exactly
        assert ours <= 2 * theirs + unit * x.abs().max().item()


def test_strided_and_expanded_inputs(tiles: None) -> None:
    case = Case("causal", 63, 63, kv_heads=4, d=8, dv=8)
    expected = case.autograd()
    packed = torch.stack([t.transpose(1, 2) for t in (case.q, case.k, case.v)], 2)  # (B, N, 3, H, D)
    case.q, case.k, case.v = (t.transpose(1, 2) for t in packed.unbind(2))
    same(case.tiles(), expected)
    case.do = torch.ones((), dtype=torch.float64).expand(case.do.shape)
    case.k = case.k[:, :1].expand(-1, 4, -1, -1)
    same(case.tiles(), case.autograd())


def test_a_nan_or_inf_score_is_what_it_is_in_eager(tiles: None) -> None:
    for value in (math.nan, math.inf):
        for name in ("plain", "causal", "padding, lowest"):
            case = Case(name, 63, 129)
            case.q[0, 1, 5, 0] = value
            expected, found = case.autograd()[:-1], case.tiles()[:-1]
            for f, e in zip(found, expected, strict=True):
                torch.testing.assert_close(f.isnan(), e.isnan())
                torch.testing.assert_close(f.nan_to_num(), e.nan_to_num(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("batch", "heads", "n", "m"), [(0, 4, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0)])
def test_nothing_to_do(batch: int, heads: int, n: int, m: int) -> None:
    case = Case("plain", 5, 5)
    case.q, case.do = torch.randn(batch, heads, n, 16, dtype=torch.float64), torch.randn(batch, heads, n, 8, dtype=torch.float64)
    case.k, case.v = torch.randn(batch, heads, m, 16, dtype=torch.float64), torch.randn(batch, heads, m, 8, dtype=torch.float64)
    expected = case.autograd()
    same(case.tiles(), expected)


def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way stays the same when the sequence is four times as long, but for the outputs."""
    monkeypatch.setattr(tiled, "TILE", 2**12)
    monkeypatch.setattr(tiled, "KEYS", 2**7)

    def largest(n: int) -> int:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Watch(TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    Watch.seen = max(Watch.seen, out.untyped_storage().nbytes() // out.element_size())
                return out

        Watch.seen = 0
        case = Case("causal", n, n, d=4, dv=4)
        inputs = case.q.numel()
        with Watch():
            case.tiles()
        return max(0, Watch.seen - inputs)

    assert largest(512) <= largest(128) + 2**12
