"""Check the kernels on a GPU: python benchmarks/gpu_check.py [--check] [--odd-shapes].

--check       agreement with the reference and with float64 over odd shapes, dtypes and layouts; gradients,
              graphs, determinism, borders, large offsets. Exits 1 where something is proven wrong.
--odd-shapes  every kernel on small odd shapes, nothing else: for compute-sanitizer, with
              PYTORCH_NO_CUDA_MEMORY_CACHING=1 so that it sees every allocation's true end. --share I/K runs every
              K-th shape from the I-th on: all of them take racecheck many minutes.

``nox -s bench`` times the operations.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("reference", "tests", "cuda_ext")]

# Imported after the path is set: the checkout's own packages, and the tests' judge, which is in no package.
from judge import TOLERANCE, judge_match  # noqa: E402

import tome_cuda  # noqa: E402
import tome_reference  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SIZES = (1, 2, 3, 4, 15, 16, 17, 63, 64, 65, 129, 197, 577, 1000)
CHANNELS = (1, 3, 8, 16, 20, 32, 64, 72, 80, 128, 200, 256)
failures: list[str] = []


def expect(is_right: bool, what: str) -> None:
    if not is_right:
        failures.append(what)
        print("FAILED", what, flush=True)


def make_keys(shape: tuple[int, ...], dtype: torch.dtype, layout: str, kind: str, generator: torch.Generator) -> Tensor:
    """Keys [B, H, N, D] on the GPU: how they lie and what they hold."""
    keys = torch.randn(shape, device="cuda", generator=generator)
    n = shape[2]
    if kind == "signs":
        keys = keys.sign()
    elif kind == "duplicates":
        keys = keys[:, :, torch.randint(max(1, n // 3), (n,), device="cuda", generator=generator)]
    elif kind == "equal":
        keys = torch.ones_like(keys)
    elif kind == "hostile":
        chance = torch.rand(shape[:-1], device="cuda", generator=generator)
        keys[chance < 0.1] = torch.nan
        keys[(chance > 0.1) & (chance < 0.2)] = 0.0
        keys[(chance > 0.2) & (chance < 0.25)] = torch.inf
    elif kind == "tiny":
        keys *= 1e-4 if dtype is torch.float16 else 1e-36
    elif kind == "huge":
        keys *= 1e3 if dtype is torch.float16 else 1e30
    keys = keys.to(dtype)
    if layout == "packed":  # the middle slice of a packed qkv
        packed = torch.full((shape[0], n, 3, shape[1], shape[3]), 9.0, device="cuda", dtype=dtype)
        packed[:, :, 1] = keys.transpose(1, 2)
        return packed[:, :, 1].transpose(1, 2)
    if layout == "misaligned":
        count = keys.numel()
        return torch.cat([keys.new_zeros(1), keys.reshape(-1)])[1 : count + 1].view(shape)
    if layout == "sparse":  # every second channel of a wider tensor
        return keys.repeat_interleave(2, dim=-1)[..., ::2]
    return keys


def cases(generator: torch.Generator, count: int) -> Iterator[tuple[Tensor, int, int, str]]:
    """Keys, r, prefix and a description."""
    kinds = ("real", "real", "signs", "duplicates", "equal", "hostile", "tiny", "huge")
    layouts = ("dense", "packed", "misaligned", "sparse")

    def pick(options: tuple[Any, ...]) -> Any:
        return options[int(torch.randint(len(options), (1,)))]

    for index in range(count):
        n, d = pick(SIZES), pick(CHANNELS)
        shape = (pick((1, 2, 5)), pick((1, 1, 2, 3, 12)), n, d)
        dtype, layout, kind, prefix = pick(DTYPES), pick(layouts), pick(kinds), min(pick((0, 1, 2, 5)), n)
        cap = tome_reference.max_r(n, prefix)
        r = pick((1, 2, cap // 2, cap, cap + 3))
        name = f"case {index}: {list(shape)} {dtype} {layout} {kind} r={r} prefix={prefix}"
        yield make_keys(shape, dtype, layout, kind, generator), r, prefix, name


def check_matching(count: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    torch.manual_seed(seed)
    tokens = differing = 0
    worst = 0.0
    for keys, r, prefix, name in cases(generator, count):
        before = keys.clone()
        slot = tome_cuda.match(keys, r, prefix)
        expected = tome_reference.match(keys, r, prefix)
        expect(torch.equal(keys.nan_to_num(), before.nan_to_num()), f"{name}: the keys changed")
        _, heads, n, d = keys.shape
        merged = min(r, tome_reference.max_r(n, prefix))
        if merged == 0 or (" signs " in name and heads == 1 and d in (1, 16, 64, 256)):
            expect(torch.equal(slot, expected), f"{name}: exact keys, different slots")
            continue
        try:
            verdict = judge_match(keys, slot, r, prefix)
            expect(verdict.is_right(), f"{name}: no near-tie, {verdict}")
            worst = max(worst, *verdict)
        except AssertionError as error:
            expect(False, f"{name}: structure {error}")
        tokens += slot.numel()
        differing += int((slot != expected).sum())
        if n - prefix >= 2:
            k = 2 + r % max(1, n - prefix - 1)
            kth = tome_cuda.kth_match(keys, k, prefix)
            runs = tome_reference.kth_match(keys, k, prefix)
            agree = float((kth == runs).float().mean())
            expect(agree > 0.9 or " real " not in name, f"{name}: k={k} agrees on {agree:.3f}")
            draws = [torch.Generator("cuda").manual_seed(seed) for _ in range(2)]
            drawn = tome_cuda.random_match(keys, r, prefix, draws[0])
            wanted = tome_reference.random_match(keys, r, prefix, draws[1])
            agree = float((drawn == wanted).float().mean())
            expect(agree > 0.9 or " real " not in name, f"{name}: random agrees on {agree:.3f}")
    print(f"matching: {count} cases, worst gap {worst:.2e} (allowed {TOLERANCE:.1e}), {differing} of {tokens} slots "
          f"differ from the reference, all proven near-ties")  # fmt: skip


def random_slots(b: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """A map onto [0, m) in every row."""
    rest = torch.randint(m, (b, n - m), device="cuda", generator=generator)
    slots = torch.cat([torch.arange(m, device="cuda").expand(b, m), rest], dim=1)
    order = torch.rand(b, n, device="cuda", generator=generator).argsort(dim=1)
    return slots.gather(1, order).int()


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.detach().double() - truth.detach()).abs().max()) if truth.numel() else 0.0


def check_merging(count: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    torch.manual_seed(seed)
    for index in range(count):
        b = int(torch.randint(1, 6, ()))
        n = SIZES[int(torch.randint(len(SIZES), ()))]
        c = (1, 3, 8, 24, 64, 100, 256, 264, 384, 768, 1024, 1280, 1281)[int(torch.randint(13, ()))]
        m = (1, max(1, n // 2), n, max(1, n - 1), int(torch.randint(1, n + 1, ())))[int(torch.randint(5, ()))]
        dtype = DTYPES[index % 3]
        slot = random_slots(b, n, m, generator)
        x = torch.randn(b, n, c, device="cuda", generator=generator).to(dtype)
        if index % 5 == 1:
            x = torch.cat([x, x[:, :, :1]], dim=2)[:, :, :c]
        elif index % 5 == 2:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        size = torch.randint(1, 40, (b, n), device="cuda", generator=generator).float() if index % 3 else None
        name = f"merge {index}: [{b}, {n}, {c}] -> {m} {dtype} strides {x.stride()}"
        xs = [x.detach().requires_grad_() for _ in range(2)]
        ours, total = tome_cuda.merge(xs[0], slot, m, size)
        theirs, wanted = tome_reference.merge(xs[1], slot, m, size)
        truth, _ = tome_reference.merge(x.double(), slot, m, size)
        floor = ROUNDING[dtype] * (float(truth.abs().max()) + 1e-30)
        expect(torch.equal(total, wanted), f"{name}: sizes")
        expect(error(ours, truth) <= error(theirs, truth) + floor, f"{name}: {error(ours, truth):.2e}")
        members = torch.zeros(b, m, device="cuda").scatter_add(1, slot.long(), torch.ones(b, n, device="cuda"))
        alone = members.gather(1, slot.long()) == 1
        expect(torch.equal(tome_cuda.unmerge(ours, slot)[alone], x[alone]), f"{name}: a lone token changed")
        expect(torch.equal(tome_cuda.unmerge(ours, slot), tome_reference.unmerge(ours, slot)), f"{name}: unmerge")
        grad = torch.randn(b, m, c, device="cuda", generator=generator).to(dtype)
        (g_ours,) = torch.autograd.grad(ours, xs[0], grad)
        (g_theirs,) = torch.autograd.grad(theirs, xs[1], grad)
        expect(
            torch.equal(g_ours, g_theirs) or error(g_ours, g_theirs.double()) <= floor * 4,
            f"{name}: gradient",
        )
        y = torch.randn(b, m, c, device="cuda", generator=generator).to(dtype)
        back = torch.randn(b, n, c, device="cuda", generator=generator).to(dtype)
        sums = []
        for backend in (tome_cuda, tome_reference):
            leaf = y.clone().requires_grad_()
            sums.append(torch.autograd.grad(backend.unmerge(leaf, slot), leaf, back)[0])
        index_c = slot.long()[:, :, None].expand(-1, -1, c)
        exact = torch.zeros(b, m, c, device="cuda", dtype=torch.float64).scatter_add(1, index_c, back.double())
        floor = ROUNDING[dtype] * float(exact.abs().max())
        expect(error(sums[0], exact) <= error(sums[1], exact) + floor, f"{name}: unmerge gradient")
    print(f"merging: {count} cases")


def layer(b: int, n: int, c: int, d: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    """x [B, N, C] and keys [B, H, N, D] sliced from a packed qkv."""
    qkv = torch.randn(b, n, 3, c // d, d, device="cuda").to(dtype)
    return torch.randn(b, n, c, device="cuda").to(dtype), qkv[:, :, 1].transpose(1, 2)


def check_runs() -> None:
    """Determinism, streams, graphs, borders, torch's own check of operators, offsets beyond 2^31."""
    for b, n, c, d, r in ((8, 197, 768, 64, 16), (4, 1369, 1280, 80, 40), (1, 4096, 640, 64, 2048)):
        x, keys = layer(b, n, c, d)
        size = torch.randint(1, 9, (b, n), device="cuda").float()

        def step(x: Tensor = x, keys: Tensor = keys, size: Tensor = size, n: int = n, r: int = r) -> list[Tensor]:
            slot = tome_cuda.match(keys, r, 0)
            merged, total = tome_cuda.merge(x, slot, n - r, size)
            return [slot, merged, total, tome_cuda.unmerge(merged, slot)]

        first = step()
        same = all(all(map(torch.equal, first, step())) for _ in range(100))
        expect(same, f"[{b}, {n}]: 100 runs differ")
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        results = []
        for stream in streams * 5:
            with torch.cuda.stream(stream):
                results.append(step())
        torch.cuda.synchronize()
        expect(all(all(map(torch.equal, first, result)) for result in results), f"[{b}, {n}]: two streams differ")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        x.copy_(torch.randn_like(x))
        keys.copy_(torch.randn_like(keys))
        graph.replay()
        expect(all(map(torch.equal, captured, step())), f"[{b}, {n}]: a replayed graph differs")

    ops = torch.ops.tome_cuda
    x = torch.randn(2, 9, 24, device="cuda", requires_grad=True)
    keys = torch.randn(2, 3, 9, 16, device="cuda")
    slot = tome_cuda.match(keys, 3)
    size = torch.rand(2, 9, device="cuda") + 1
    merged, total = tome_cuda.merge(x, slot, 6, size)
    positions = torch.arange(1, 9, device="cuda").expand(2, 8)
    leaf = merged.detach().requires_grad_()
    for op, arguments in (
        (ops.bipartite_match, (keys, 3, 1)),
        (ops.kth_match, (keys, 2, 1)),
        (ops.listed_match, (keys, positions[:, :3].contiguous(), positions[:, 3:].contiguous(), 1)),
        (ops.merge, (x, slot, 6, size)),
        (ops.merge, (x, slot, 6, None)),
        (ops.merge_backward, (leaf, slot, size, total)),
        (ops.unmerge, (leaf, slot)),
        (ops.unmerge_backward, (x, slot, 6)),
        (ops.attention, (*torch.randn(3, 2, 3, 9, 64, device="cuda").half(), size, 0.125)),
    ):
        try:
            torch.library.opcheck(op.default, arguments)
        except Exception as reason:  # opcheck raises whatever the failing test raised; the rest must still run
            expect(False, f"opcheck {op}: {reason}")

    for shape, m in (((2, 64, 128), 32), ((2, 128, 256), 100)):
        check_borders(shape, m)
    check_large()
    print("determinism, streams, graphs, operators, borders, offsets: done")


def check_borders(shape: tuple[int, int, int], m: int) -> None:
    """Whole 512-byte outputs that land between two stretches of poison."""
    b, n, c = shape
    x = torch.randn(shape, device="cuda", dtype=torch.float16)
    keys = torch.randn(b, n, 64, device="cuda", dtype=torch.float16)
    slot = tome_cuda.match(keys, n - m, 0)
    merged, _ = tome_cuda.merge(x, slot, m)
    calls: tuple[tuple[int, Callable[[], Tensor]], ...] = (
        (4 * b * n, lambda: tome_cuda.match(keys, n - m, 0)),
        (2 * b * m * c, lambda: tome_cuda.merge(x, slot, m)[0]),
        (2 * b * n * c, lambda: tome_cuda.unmerge(merged, slot)),
    )
    for count, call in calls:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        blocks = [torch.full((count,), 0xA5, dtype=torch.uint8, device="cuda") for _ in range(9)]
        middle = blocks.pop(4)
        address = middle.data_ptr()
        del middle
        out = call()
        torch.cuda.synchronize()
        placed = out.data_ptr() == address
        intact = all(bool((block == 0xA5).all()) for block in blocks)
        expect(intact, f"borders {shape}: a stray write of {count} bytes")
        print(f"borders {shape}, {count} bytes: {'intact' if intact else 'BROKEN'}, between poison: {placed}")


def check_large() -> None:
    """Tensors of more than 2^31 elements: the last image must equal itself computed alone."""
    b, n, c = 9, 262144, 1024
    x = torch.empty(b, n, c, device="cuda", dtype=torch.float16)
    for image in x:
        image.normal_()
    slot = (torch.arange(n, device="cuda") // 2).int().expand(b, n)
    merged, total = tome_cuda.merge(x, slot, n // 2)
    alone, _ = tome_cuda.merge(x[-1:].clone(), slot[-1:], n // 2)
    expect(torch.equal(merged[-1:], alone) and bool((total == 2).all()), "merge beyond 2^31 elements")
    expect(error(merged[-1, -3:], x[-1].view(n // 2, 2, c)[-3:].double().mean(dim=1)) < 2e-3, "merge, last rows")
    restored = tome_cuda.unmerge(merged, slot)
    expect(torch.equal(restored[-1, -2], merged[-1, -1]), "unmerge beyond 2^31 elements")
    del x, merged, restored, alone
    keys = torch.empty(300, 16, 8192, 64, device="cuda", dtype=torch.float16)
    for image in keys:
        image.normal_()
    slots = tome_cuda.match(keys, 1000)
    expect(torch.equal(slots[-1:], tome_cuda.match(keys[-1:].clone(), 1000)), "match beyond 2^31 elements")
    del keys
    for n in (197, 577):
        b = 2**32 // (n * 3 * 1024)
        qkv = torch.empty(b, n, 3, 16, 64, device="cuda", dtype=torch.float16)
        for images in qkv.split(64):
            images.normal_()
        size = torch.randint(1, 9, (b, n), device="cuda").float()
        out = tome_cuda.attention(*qkv.permute(2, 0, 3, 1, 4), size)
        alone = tome_cuda.attention(*qkv[-2:].clone().permute(2, 0, 3, 1, 4), size[-2:])
        expect(torch.equal(out[-2:], alone), f"attention of {n} tokens beyond 2^31 elements")
        del qkv, out


def odd_shapes(first: int, step: int) -> None:
    """Every kernel and path once or more, small enough for compute-sanitizer."""
    generator = torch.Generator("cuda").manual_seed(0)
    layouts = ("dense", "packed", "misaligned", "sparse")
    short = itertools.product((3, 17, 197), (3, 16, 72), layouts, DTYPES)
    long = itertools.product((577, 1030), (1, 64, 80, 200, 256), ("packed",), DTYPES)
    longest = itertools.product((2100,), (64, 72), ("packed",), DTYPES)
    for n, d, layout, dtype in itertools.islice(itertools.chain(short, long, longest), first, None, step):
        keys = make_keys((2, 3, n, d), dtype, layout, "real", generator)
        tome_cuda.match(keys, n // 3)
        if n < 200:
            tome_cuda.kth_match(keys, 2)
            tome_cuda.random_match(keys, n // 3)
    rows = itertools.product((2,), (1, 33, 197, 1100), (1, 8, 100, 264, 768, 1024, 1280), DTYPES)
    many_rows = itertools.product((9,), (2100,), (8, 100), DTYPES)  # in blocks of eight warps
    for b, n, c, dtype in itertools.islice(itertools.chain(rows, many_rows), first, None, step):
        for m in {1, max(1, n // 2), n}:
            slot = random_slots(b, n, m, generator)
            x = torch.randn(b, n, c, device="cuda").to(dtype).requires_grad_()
            merged, _ = tome_cuda.merge(x, slot, m, torch.rand(b, n, device="cuda") + 1)
            tome_cuda.unmerge(merged, slot).sum().backward()
            branch = torch.randn(b, n, c, device="cuda").to(torch.float16 if dtype is torch.float32 else dtype)
            weight, gamma = (torch.ones(c, device="cuda", requires_grad=True) for _ in range(2))
            for arguments in ((slot, m), (None, n)):
                out, y, _ = tome_cuda.merge_add_norm(
                    *(x, branch, *arguments, None, weight, None, 1e-5, gamma), norm_dtype=branch.dtype
                )
                (out.sum() + y.sum()).backward()
    lengths, dims = (1, 16, 33, 70, 101, 197, 212, 256, 270, 400), tome_cuda.library.info().head_dims
    shapes = itertools.product(lengths, dims, ("packed", "misaligned"), DTYPES[1:])
    for n, d, layout, dtype in itertools.islice(shapes, first, None, step):
        q, k, v = (make_keys((2, 3, n, d), dtype, layout, "real", generator) for _ in range(3))
        size = torch.randint(0, 9, (2, n), device="cuda").float()
        tome_cuda.attention(q[:, :, : n - n // 3], k, v, size)
        tome_cuda.attention(q, k, v)
    torch.cuda.synchronize()
    print(f"odd shapes, share {first}/{step}: done")


def main() -> int:
    """Run what was asked for; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--check", "--odd-shapes"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--share", default="0/1", metavar="I/K", help="which of the odd shapes to run")
    parser.add_argument("--cases", type=int, default=400, help="drawn cases for matching and for merging")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    reason = tome_cuda.unavailable()
    if reason is not None:
        print(reason)
        return 1
    print(torch.cuda.get_device_name(), "torch", torch.__version__, tome_cuda.build_info())
    if options.odd_shapes:
        odd_shapes(*map(int, options.share.split("/")))
    if options.check:
        check_matching(options.cases, options.seed)
        check_merging(options.cases, options.seed)
        check_runs()
    print(f"{len(failures)} failed" if failures else "all right")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
