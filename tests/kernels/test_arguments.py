"""What `fusion_kernels.attention` says to arguments that do not fit, and captures against what their program reads."""

from __future__ import annotations

import itertools
from typing import Any

import fusion_kernels
import numpy
import pytest
import torch
from fusion_kernels.checking import check_program
from fusion_kernels.extents import extents
from fusion_kernels.op import ATTENTION
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, param, size
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

B, H, Q, K = (index(n) for n in "bhqk")
N, M = 9, 11
G = torch.Generator().manual_seed(0)
GIVEN = {"q": torch.randn(2, 4, N, 8, generator=G), **{name: torch.randn(2, 2, M, 8, generator=G) for name in "kv"}}


def attention(**changes: Any) -> Any:
    return fusion_kernels.attention(**{**GIVEN, **changes})


def reading(*at: Node | int, sink: bool = False, params: int = 0) -> Program:
    """score + captures[0][at], or a sink captures[0][at]."""
    read = load(0, "float", [a if isinstance(a, Node) else const(a) for a in at])
    captures = (Capture("float", len(at)),)
    if sink:
        return Program(SCORE, captures, zero_rows=True, sink=read)
    return Program(apply("add", SCORE, read), captures, params)


# ---------------------------------------------------------------- types and values

R = torch.randn
TYPES: list[tuple[dict[str, Any], str]] = [
    ({"q": None}, "q is None; needed: a torch.Tensor"),
    ({"k": numpy.zeros((2, 2, M, 8), "f")}, "k is a ndarray; needed: a torch.Tensor"),
    ({"v": [1.0]}, r"v is \[1.0\] \(list\); needed: a torch.Tensor"),
    ({"q": "queries"}, r"q is 'queries' \(str\)"),
    ({"bias": 1.0}, r"bias is 1.0 \(float\); needed: a torch.Tensor"),
    ({"mask": numpy.ones((N, M), bool)}, r"mask is a ndarray; .*torch.as_tensor\(mask\)"),
    ({"sink": [0.0]}, r"sink is \[0.0\] \(list\)"),
    ({"scale": "a"}, r"scale is 'a' \(str\); needed: a number, or"),
    ({"softcap": "a"}, "softcap is 'a'"),
    ({"softcap": torch.tensor(2.0)}, r"softcap is a Tensor; needed: a number \(softcap.item\(\)"),
    ({"window": 2.5}, r"window is 2.5 \(float\); needed: an int"),
    ({"window": True}, r"window is True \(bool\); needed: an int"),
    ({"causal": "yes"}, r"causal is 'yes' \(str\); needed: True or False"),
    ({"causal": torch.ones(3)}, "causal is a Tensor"),
    ({"dropout_p": "a"}, "dropout_p is 'a'"),
    ({"seed": 1.5}, r"seed is 1.5 \(float\); needed: an int, or a 0-d int64 tensor"),
    ({"program": 3}, r"program is 3 \(int\); needed: a fusion_kernels.Program"),
    ({"program": reading(Q, K), "captures": R(N, M)}, "captures is a Tensor; needed: a list or tuple of tensors"),
    ({"program": reading(Q, K), "captures": None}, "captures is None"),
    ({"program": reading(Q, K), "captures": [None]}, r"captures\[0\] is None"),
    ({"program": reading(Q, K), "captures": [R(N, M)], "params": [1.5]}, r"params\[0\] is 1.5 \(float\)"),
]
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"q": R(2, 4, N, 0), "k": R(2, 2, M, 0)}, r"q has shape \(2, 4, 9, 0\); needed: a head dim"),
    ({"q": R(2, 4, N, 8).to_sparse()}, r"q has layout torch.sparse_coo; needed: a dense tensor: q.to_dense\(\)"),
    ({"bias": R(N, M).to_sparse()}, "bias has layout torch.sparse_coo"),
    ({"bias": R(N, M, device="meta")}, r"bias is on meta and q on cpu; needed: one device, bias.to\(q.device\)"),
    ({"mask": R(N, M, device="meta")}, "mask is on meta and q on cpu"),
    ({"scale": torch.tensor(0.2, device="meta")}, "scale is on meta and q on cpu"),
    ({"scale": R(3)}, r"scale has shape \(3,\); needed: one element"),
    ({"scale": torch.tensor(2)}, "scale has dtype torch.int64; needed: floating point$"),
    ({"softcap": float("inf")}, "softcap is inf; needed: a positive number"),
    ({"seed": 2**70, "dropout_p": 0.5}, "seed is 1180591620717411303424; needed: an int of 64 bits"),
]


@pytest.mark.parametrize(("arguments", "message"), TYPES, ids=[m[:40] for _, m in TYPES])
def test_a_wrong_type_names_its_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^fusion_kernels: {message}"):
        attention(**arguments)


@pytest.mark.parametrize(("arguments", "message"), VALUES, ids=[m[:40] for _, m in VALUES])
def test_a_wrong_value_names_its_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^fusion_kernels: {message}"):
        attention(**arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    found = attention(scale=numpy.float32(0.5), window=numpy.int64(3), dropout_p=numpy.float32(0.5), seed=numpy.int64(7))
    assert torch.equal(found, attention(scale=0.5, window=3, dropout_p=0.5, seed=7))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_that_is_learned_has_its_gradient(shape: tuple[int, ...]) -> None:
    scale, bias = torch.full(shape, 0.2, requires_grad=True), R(4, 1, M, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(attention(scale=scale, bias=bias), attention(scale=0.2, bias=bias))
    q, k, v = R(2, 4, N, 8), R(2, 4, M, 8), R(2, 4, M, 8)
    do = R(2, 4, N, 8)
    found = fusion_kernels.attention(q, k, v, scale=scale, bias=bias, causal=True)
    visible = torch.arange(M) <= torch.arange(N)[:, None]
    expected = torch.softmax((q @ k.mT * scale.reshape(()) + bias).masked_fill(~visible, -torch.inf), -1) @ v
    torch.testing.assert_close(found, expected)
    for f, e in zip(torch.autograd.grad(found, [scale, bias], do), torch.autograd.grad(expected, [scale, bias], do), strict=True):
        assert f.shape == e.shape
        torch.testing.assert_close(f, e)


def test_a_scale_that_is_learned_compiles_whole() -> None:
    torch._dynamo.reset()
    scale, q = torch.tensor(0.2, requires_grad=True), R(2, 4, N, 8)

    def model(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fusion_kernels.attention(q, q, q, scale=scale, causal=True)  # type: ignore[return-value]

    found, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(q, scale), model(q, scale)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), scale)[0] for out in (found, expected)))


# ---------------------------------------------------------------- transforms

FORWARD, FUNC, VMAP = "attention was differentiated in forward mode", "attention was differentiated by torch.func", "under vmap"
TRANSFORMS = {
    "jvp": (lambda f, q: torch.func.jvp(f, (q,), (q,)), FORWARD),
    "jacfwd": (lambda f, q: torch.func.jacfwd(f)(q), FORWARD),
    "grad": (lambda f, q: torch.func.grad(lambda q: f(q).sum())(q), FUNC),
    "vjp": (lambda f, q: torch.func.vjp(f, q), FUNC),
    "jacrev": (lambda f, q: torch.func.jacrev(f)(q), FUNC),
    "vmap": (lambda f, q: torch.func.vmap(f)(q.unsqueeze(0)), VMAP),
    "vmap of grad": (lambda f, q: torch.func.vmap(torch.func.grad(lambda q: f(q).sum()))(q.unsqueeze(0)), FUNC),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_refused_in_our_words(name: str) -> None:
    transform, message = TRANSFORMS[name]
    with pytest.raises(NotImplementedError, match=f"^fusion_kernels: .*{message}"):
        transform(lambda q: attention(q=q), R(2, 4, N, 8))


# ---------------------------------------------------------------- captures against what is read


def test_a_capture_that_is_too_small_is_refused() -> None:
    """On a CPU it was a bare RuntimeError of a broadcast, on a GPU memory of somebody else."""
    message = (
        r"^fusion_kernels: captures\[0\] has shape \(3, 3\) and is read at q in dim 0, up to 8; needed: at least 9 there, "
        r"for q of shape \(2, 4, 9, 8\) and k of shape \(2, 2, 11, 8\)"
    )
    with pytest.raises(ValueError, match=message):
        attention(program=reading(Q, K), captures=[R(3, 3)])
    q, k = R(2, 4, N, 8), R(2, 2, M, 8)
    with pytest.raises(ValueError, match=message):
        ATTENTION(q, k, k, [R(3, 3)], [], reading(Q, K).text, 0.0, None)


BACK = apply("sub", Q, K)
READS: dict[str, tuple[Program, tuple[int, ...], tuple[int, ...], str]] = {  # the least shape that is enough, one too small
    "plain": (reading(B, H, Q, K), (2, 4, N, M), (2, 4, N, M - 1), "read at k in dim 3, up to 10; needed: at least 11"),
    "broadcast": (reading(Q, K), (N, M), (1, M), "at least 9 there, .*a dim of one is read at the constant 0"),
    "constant": (reading(3, K), (4, M), (3, M), "read at 3 in dim 0, up to 3; needed: at least 4"),
    "shifted": (reading(apply("add", BACK, const(M - 1))), (N + M - 1,), (N + M - 2,), "up to 18; needed: at least 19"),
    "by a size": (reading(apply("add", BACK, apply("sub", size("M"), const(1)))), (N + M - 1,), (N,), "at least 19"),
    "far": (reading(apply("abs", BACK)), (M,), (M - 1,), r"read at abs\(q - k\) in dim 0, up to 10; needed: at least 11"),
    "blocks": (reading(apply("floordiv", K, const(4))), (3,), (2,), "read at k // 4 in dim 0, up to 2; needed: at least 3"),
    "merged": (reading(apply("add", apply("mul", B, const(4)), H)), (8,), (7,), r"needed: at least 8"),
    "the end": (reading(apply("minimum", K, const(5))), (6,), (5,), "needed: at least 6"),
    "a sink": (reading(B, H, sink=True), (2, 4), (2, 3), "read at h in dim 1, up to 3"),
}


@pytest.mark.parametrize("name", READS)
def test_captures_hold_what_is_read(name: str) -> None:
    program, enough, small, message = READS[name]
    assert attention(program=program, captures=[R(enough)]).isfinite().all()
    attention(program=program, captures=[R([n + 3 for n in enough])])  # more than enough
    with pytest.raises(ValueError, match=rf"^fusion_kernels: captures\[0\] has shape .*{message}"):
        attention(program=program, captures=[R(small)])


def test_an_index_below_zero_is_refused() -> None:
    """torch counts from the end there, and a kernel does not."""
    with pytest.raises(ValueError, match="is read at q - k in dim 0, from -10; needed: an index from 0"):
        attention(program=reading(BACK), captures=[R(50)])


def test_parameters_count() -> None:
    program = reading(apply("add", Q, param(0)), params=1)
    attention(program=program, captures=[R(N + 5)], params=[5])
    with pytest.raises(ValueError, match=r"read at q \+ params\[0\] in dim 0, up to 14; needed: at least 15"):
        attention(program=program, captures=[R(N + 5)], params=[6])


def test_nothing_is_read_of_an_empty_problem() -> None:
    for n, m in ((0, M), (N, 0)):
        q, k = R(2, 4, n, 8), R(2, 2, m, 8)
        assert attention(q=q, k=k, v=k, program=reading(Q, K), captures=[R(1, 1)]).shape == q.shape


def test_extents_are_what_is_read() -> None:
    """Against every element of small problems, for expressions of every form; the ends are exact wherever they are known."""
    atoms = [Q, K, B, const(2), apply("mul", K, const(-3)), apply("floordiv", Q, const(2))]
    atoms.append(apply("abs", apply("sub", K, const(3))))
    pairs = [apply(op, x, y) for op in ("add", "sub", "minimum", "maximum") for x, y in itertools.product(atoms, repeat=2)]
    more = [apply("abs", x) for x in pairs] + [apply(op, x, const(3)) for x in pairs for op in ("floordiv", "mod")]
    known = 0
    for at in dict.fromkeys([*atoms, *pairs, *more]):
        values = [_value(at, dict(zip("bhqk", place))) for place in itertools.product(*(range(n) for n in (2, 1, 5, 7)))]
        for found in extents(reading(at), (2, 1, 5, 7), ()):
            known += 1
            assert found.first in (None, min(values)), at
            assert found.last in (None, max(values)), at
    assert known > 100


def _value(node: Node, at: dict[str, int]) -> int:
    if node.op in ("const", "index"):
        return node.attr if node.op == "const" else at[node.attr]  # type: ignore
    args = [_value(a, at) for a in node.args]
    return {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a, "abs": abs,
        "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "minimum": min, "maximum": max,
    }[node.op](*args)  # fmt: skip


def test_symbolic_sizes_are_not_guarded() -> None:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)

    def symbolic(*shape: int, dim: int) -> torch.Tensor:
        dims = [DimDynamic.DYNAMIC if i == dim else DimDynamic.STATIC for i in range(len(shape))]
        return mode.from_tensor(torch.empty(shape), symbolic_context=StatelessSymbolicContext(dims))

    q, k, small = symbolic(2, 4, N, 8, dim=2), symbolic(2, 4, M, 8, dim=2), symbolic(3, 3, dim=1)
    check_program(q, k, [small], [], reading(Q, K))
    check_program(GIVEN["q"], k, [symbolic(3, M, dim=0)], [], reading(Q, K))
    assert not env.guards
    with pytest.raises(ValueError, match=r"read at h in dim 1, up to 3; needed: at least 4 there"):
        check_program(q, k, [symbolic(9, 3, dim=0)], [], reading(Q, H))  # what is known is checked
