"""Times tile shapes of the Triton kernels, beside FlexAttention and cuDNN, on the GPU at hand.

    python tests/gpu/tune.py tiles  [--only SUBSTRING]   every tile shape of the sweep, forward and backward
    python tests/gpu/tune.py fp32                        exact fp32 products two ways; what a launch costs the host
    python tests/gpu/tune.py peers                       the chosen tiles beside torch's kernels

Kernels are compiled first, in parallel processes, into Triton's cache; then timed one by one (medians of do_bench).
TFLOP/s count 4 B H N M D forward and 10 backward, times the share of (q, k) pairs that the mask lets through.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from fusion_kernels import configs
from fusion_kernels.backward import attention_backward
from fusion_kernels.configs import Tile
from fusion_kernels.forward import attention_forward
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load

Q, K, B, H = index("q"), index("k"), index("b"), index("h")
NEVER = const(float("-inf"))
CAUSAL = apply("ge", Q, K)


@dataclass
class Work:
    program: Program
    captures: list[torch.Tensor]
    share: float = 1.0  # of the (q, k) pairs that count
    dropout: float = 0.0
    wrt: tuple[int, ...] = ()


def works(batch: int, heads: int, n: int, d: int) -> dict[str, Callable[[], Work]]:
    s = apply("mul", SCORE, const(d**-0.5))

    def where(p: Node, x: Node = s) -> Program:
        return Program(apply("where", p, x, NEVER))

    def alibi() -> Work:
        bias = apply("mul", load(0, "float", [H]), apply("to_float", apply("sub", K, Q)))
        slopes = 2.0 ** -torch.linspace(1, 8, heads, device="cuda")
        return Work(Program(apply("add", s, bias), (Capture("float", 1),)), [slopes])

    def padding() -> Work:
        keep = torch.ones(batch, n, dtype=torch.bool, device="cuda")
        keep[:, -n // 8 :] = False
        return Work(Program(where(load(0, "bool", [B, K])).root, (Capture("bool", 2),)), [keep])

    def bias(wrt: tuple[int, ...] = ()) -> Work:
        table = torch.randn(1, heads, n, n, device="cuda", dtype=torch.bfloat16)
        return Work(Program(apply("add", s, load(0, "float", [const(0), H, Q, K])), (Capture("float", 4),)), [table], wrt=wrt)

    window = apply("and", CAUSAL, apply("lt", apply("sub", Q, K), const(256)))
    return {
        "full": lambda: Work(Program(s), []),
        "causal": lambda: Work(where(CAUSAL), [], share=(n + 1) / (2 * n)),
        "window": lambda: Work(where(window), [], share=256 / n if n > 512 else 0.4),
        "alibi": alibi,
        "softcap": lambda: Work(Program(apply("mul", apply("tanh", apply("div", s, const(20.0))), const(20.0))), []),
        "padding": padding,
        "bias": bias,
        "bias, learned": lambda: bias((0,)),
        "dropout": lambda: Work(Program(s), [], dropout=0.1),
    }


class Run:
    """One problem with its buffers: `forward()` and `backward()` launch the kernels, with tiles of choice."""

    def __init__(
        self, batch: int, heads: int, n: int, d: int, name: str, dtype: torch.dtype = torch.bfloat16, group: int = 1
    ) -> None:
        torch.manual_seed(0)
        name, _, kind = name.partition(" in ")
        dtype = getattr(torch, kind) if kind else dtype
        self.work = works(batch, heads, n, d)[name]()
        make = functools.partial(torch.randn, device="cuda", dtype=dtype)
        self.q, self.do = make(batch, heads, n, d), make(batch, heads, n, d)
        self.k, self.v = make(batch, heads // group, n, d), make(batch, heads // group, n, d)
        self.out, self.lse = torch.empty_like(self.q), torch.empty(batch, heads, n, device="cuda")
        self.dq, self.dk, self.dv = torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.v)
        self.seed = torch.tensor(123456789, device="cuda")
        self.flops = 4 * batch * heads * n * n * d * self.work.share
        self.buffers = [
            torch.zeros(c.shape, device="cuda") if i in self.work.wrt else None for i, c in enumerate(self.work.captures)
        ]
        self.needs = [b is not None for b in self.buffers]

    def forward(self, tile: Tile | None = None) -> None:
        w = self.work
        attention_forward(self.q, self.k, self.v, w.captures, (), w.program, w.dropout, self.seed, self.out, self.lse, tile)

    def backward(self, dkdv: Tile | None = None, dq: Tile | None = None) -> None:
        w = self.work
        attention_backward(
            self.do, self.q, self.k, self.v, w.captures, (), w.program, w.dropout, self.seed, self.out, self.lse, self.needs,
            self.dq, self.dk, self.dv, self.buffers, dkdv, dq,
        )  # fmt: skip


def bench(f: Callable[[], Any], rep: int = 60) -> float:
    return triton.testing.do_bench(f, warmup=20, rep=rep, return_mode="median")


# ---------------------------------------------------------------- the sweep

SIZES = {64: (4, 32, 4096), 128: (4, 16, 4096), 256: (4, 8, 4096), 80: (4, 16, 4096), 72: (4, 16, 4096)}


def _tiles(
    shapes: list[tuple[int, int]], warps_stages: list[tuple[int, int]], tma: tuple[bool, ...] = (False, True)
) -> list[Tile]:
    return [Tile(m, n, w, s, t) for (m, n), (w, s), t in itertools.product(shapes, warps_stages, tma)]


FORWARD = {
    64: _tiles([(128, 64), (128, 128)], [(4, 2), (4, 3), (8, 3)])
    + _tiles([(64, 64), (64, 128)], [(4, 3)])
    + _tiles([(256, 64)], [(8, 3)]),
    128: _tiles([(128, 64)], [(4, 3), (8, 2), (8, 3), (8, 4)])
    + _tiles([(128, 128)], [(8, 2), (8, 3)])
    + _tiles([(64, 64), (64, 128)], [(4, 2), (4, 3)]),
    256: _tiles([(128, 64), (128, 32)], [(8, 2)]) + _tiles([(64, 64), (64, 32)], [(4, 2), (4, 3)]),
    80: _tiles([(128, 64), (128, 128)], [(8, 2), (8, 3)], (False,)) + _tiles([(64, 64), (128, 64)], [(4, 3)], (False,)),
}
DKDV = {
    64: _tiles([(64, 128)], [(8, 2), (8, 3)])
    + _tiles([(64, 64), (32, 128), (64, 128)], [(4, 3)])
    + _tiles([(128, 128)], [(8, 2)]),
    128: _tiles([(64, 128)], [(8, 2), (8, 3)]) + _tiles([(64, 64), (32, 64)], [(4, 2), (4, 3)]) + _tiles([(32, 128)], [(8, 3)]),
    256: _tiles([(32, 64), (64, 64)], [(4, 1), (8, 1), (8, 2)]),
    80: _tiles([(64, 128)], [(8, 2)], (False,)) + _tiles([(64, 64), (32, 64)], [(4, 2)], (False,)),
}
DQ = {
    64: _tiles([(128, 64)], [(8, 2), (8, 3), (4, 3)]) + _tiles([(64, 64), (64, 128)], [(4, 3)]) + _tiles([(128, 128)], [(8, 2)]),
    128: _tiles([(128, 64)], [(8, 2), (8, 3)]) + _tiles([(64, 64)], [(4, 2), (4, 3)]) + _tiles([(128, 128), (128, 32)], [(8, 2)]),
    256: _tiles([(64, 32), (64, 64)], [(4, 1), (4, 2)]) + _tiles([(128, 32)], [(8, 1)]),
    80: _tiles([(128, 64)], [(8, 2)], (False,)) + _tiles([(64, 64)], [(4, 2)], (False,)),
}
FLOAT32 = {
    "forward": _tiles([(64, 32), (64, 64), (128, 32), (128, 64)], [(4, 2), (8, 2)], (False,)),
    "dkdv": _tiles([(32, 32), (32, 64), (64, 64), (16, 64), (64, 32)], [(4, 1), (8, 1), (4, 2)], (False,)),
    "dq": _tiles([(32, 32), (64, 32), (64, 64), (64, 16)], [(4, 1), (8, 1), (4, 2)], (False,)),
}
SWEEP = [
    (64, "full"),
    (64, "causal"),
    (128, "full"),
    (128, "causal"),
    (64, "dropout"),
    (128, "dropout"),
    (128, "bias"),
    (256, "causal"),
    (80, "causal"),
    (64, "causal in float32"),
    (128, "causal in float32"),
]


def variants(only: str) -> list[tuple[int, str, str, Tile]]:
    out = []
    for d, name in SWEEP:
        for part, table in (("forward", FORWARD), ("dkdv", DKDV), ("dq", DQ)):
            tiles = FLOAT32[part] if name.endswith("float32") else table[d]
            out += [(d, name, part, tile) for tile in tiles if only in f"{d} {name} {part}"]
    return out


def compile_one(job: tuple[int, str, str, Tile]) -> str:
    """In a child process: one launch on one head, which leaves the binary in Triton's cache."""
    d, name, part, tile = job
    try:
        run = Run(2, 2, SIZES[d][2], d, name)
        if part == "forward":
            run.forward(tile)
        else:
            run.forward()
            run.backward(**{part: tile})
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {type(error).__name__} {str(error)[:100]}"
    return ""


def sweep(only: str, limit: float) -> None:
    jobs = variants(only)
    started = time.time()
    bad = set()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        for job, message in zip(jobs, pool.imap(compile_one, jobs, chunksize=4), strict=True):
            if message:
                bad.add(job)
    print(f"compiled {len(jobs)} variants in {time.time() - started:.0f} s, {len(bad)} do not fit", flush=True)
    for (d, name, part), group in itertools.groupby(jobs, key=lambda j: j[:3]):
        if time.time() - started > limit:
            print("out of time at", d, name, part)
            return
        run = Run(*SIZES[d], d, name)
        run.forward()
        results = []
        for job in group:
            if job in bad:
                continue
            tile = job[3]
            call = functools.partial(run.forward, tile) if part == "forward" else functools.partial(run.backward, **{part: tile})
            ms = bench(call)
            results.append((run.flops * (1 if part == "forward" else 2.5) / ms / 1e9, tile))
        results.sort(key=lambda r: -r[0])
        texts = [f"{v:.0f}:{t.block_m}x{t.block_n}w{t.warps}s{t.stages}{'T' if t.tma else ''}" for v, t in results]
        print(f"D{d} {name} {part}: " + " ".join(texts), flush=True)


def tables() -> None:
    """The gradient of a learned bias, by tile."""
    for d in (64, 128):
        results = []
        for tile in _tiles([(128, 64), (64, 64), (64, 128), (128, 128)], [(4, 2), (8, 1), (8, 2), (4, 3)], (False,)):
            configs._TABLE[d] = tile
            run = Run(*SIZES[d], d, "bias, learned")
            run.forward()
            try:
                ms = bench(run.backward)
            except triton.runtime.errors.OutOfResources:
                continue
            results.append((run.flops * 2.5 / ms / 1e9, tile))
            import fusion_kernels.backward as b

            b._plans.clear()
        results.sort(key=lambda r: -r[0])
        print(f"D{d} table: " + " ".join(f"{v:.0f}:{t.block_m}x{t.block_n}w{t.warps}s{t.stages}" for v, t in results), flush=True)


# ---------------------------------------------------------------- beside the others


def flex(run: Run, name: str) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, mod, mask = run.q.shape[2], None, None
    captures = run.work.captures
    if name in ("causal", "window"):
        f = (lambda b, h, q, k: q >= k) if name == "causal" else (lambda b, h, q, k: (q >= k) & (q - k < 256))
        mask = create_block_mask(f, None, None, n, n)
    elif name == "alibi":
        mod = lambda s, b, h, q, k: s + captures[0][h] * (k - q)
    elif name == "softcap":
        mod = lambda s, b, h, q, k: torch.tanh(s / 20.0) * 20.0
    elif name == "padding":
        mask = create_block_mask(lambda b, h, q, k: captures[0][b, k], run.q.shape[0], None, n, n)
    elif name.startswith("bias"):
        table = captures[0].requires_grad_(name != "bias")
        mod = lambda s, b, h, q, k: s + table[0, h, q, k]
    elif name != "full":
        return None
    call = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.detach().requires_grad_() for x in (run.q, run.k, run.v))
    forward = lambda: call(q, k, v, score_mod=mod, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    out = forward()
    inputs = (q, k, v, captures[0]) if name == "bias, learned" else (q, k, v)
    return forward, lambda: torch.autograd.grad(out, inputs, run.do, retain_graph=True)


def cudnn(run: Run, name: str) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name not in ("full", "causal", "dropout"):
        return None
    q, k, v = (x.detach().requires_grad_() for x in (run.q, run.k, run.v))

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=name == "causal", dropout_p=run.work.dropout, enable_gqa=q.shape[1] != k.shape[1]
            )

    out = forward()
    return forward, lambda: torch.autograd.grad(out, (q, k, v), run.do, retain_graph=True)


def peer_jobs(only: str) -> list[tuple[int, int, int, int, str, int]]:
    jobs = []
    for d in (128, 64):
        for n in (4096, 512, 16384):
            tokens, heads = 16384, 16 if d == 128 else 32
            names = ["full", "causal"] if n != 4096 else list(works(1, 1, 1, 1))
            jobs += [(max(tokens // n, 1), heads, n, d, name, 1) for name in names]
        jobs += [(4, 32, 4096, d, name, 4) for name in ("full", "causal")]
    return [j for j in jobs if only in f"{j[3]} {j[4]} {j[2]} g{j[5]}"]


def warm_one(job: tuple[int, int, int, int, str, int]) -> None:
    batch, heads, n, d, name, group = job
    run = Run(batch, heads, n, d, name, group=group)
    run.forward()
    run.backward()
    peer = flex(run, name)
    if peer:
        peer[1]()
    torch.cuda.synchronize()


def peers(only: str, limit: float) -> None:
    jobs, started = peer_jobs(only), time.time()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(warm_one, jobs, chunksize=1)
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    for job in jobs:
        if time.time() - started > limit:
            print("out of time")
            return
        batch, heads, n, d, name, group = job
        run = Run(batch, heads, n, d, name, group=group)
        run.forward()
        cells = []
        mine = (run.forward, run.backward)
        for label, pair in (("ours", mine), ("flex", flex(run, name)), ("cudnn", cudnn(run, name))):
            if pair:
                f, b = (run.flops * x / bench(c) / 1e9 for x, c in zip((1, 2.5), pair, strict=True))
                cells.append(f"{label} {f:.0f}/{b:.0f}")
        print(f"({batch},{heads},{n},{d}) g{group} {name}: " + "  ".join(cells), flush=True)
        del run, mine
        torch._dynamo.reset()


def fp32() -> None:
    """What exact fp32 products cost and lose, and what one launch costs the host."""
    for d, n, mode in itertools.product((64, 128, 256), (1024, 8192), ("ieee", "tf32x3")):
        if mode == "ieee" and (d, n) != (64, 1024):
            continue  # slow
        configs.EXACT_FP32 = mode
        run = Run(1, 2, n, d, "causal", torch.float32)
        run.forward()
        run.backward()
        x = [t.detach().double().requires_grad_() for t in (run.q, run.k, run.v)]
        y = [t.detach().requires_grad_() for t in (run.q, run.k, run.v)]
        mask = torch.ones(n, n, dtype=torch.bool, device="cuda").tril()
        results = []
        for q, k, v in (x, y):
            out = ((q @ k.transpose(-1, -2)) * d**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
            results.append([out, *torch.autograd.grad(out, (q, k, v), run.do.to(q.dtype))])
        exact, eager = results
        norm = lambda a, b: f"{((a.double() - b).norm() / b.norm()).item():.1e}"
        ours = [norm(a, b) for a, b in zip((run.out, run.dq, run.dk, run.dv), exact, strict=True)]
        theirs = [norm(a, b) for a, b in zip(eager, exact, strict=True)]
        times = f"forward {bench(run.forward):.3f} ms backward {bench(run.backward):.3f} ms"
        print(f"fp32 D{d} N{n} {mode}: ours {' '.join(ours)} eager {' '.join(theirs)} {times}", flush=True)
    run = Run(1, 1, 64, 64, "causal")
    for name, call in (("forward", run.forward), ("backward", run.backward)):
        call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            call()
        print(f"host: {name} {(time.perf_counter() - started) * 5e3:.0f} us a call", flush=True)
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["tiles", "peers", "fp32", "tables"])
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=240.0)
    options = parser.parse_args()
    if options.what in ("fp32", "tables"):
        {"fp32": fp32, "tables": tables}[options.what]()
    else:
        (sweep if options.what == "tiles" else peers)(options.only, options.limit)
