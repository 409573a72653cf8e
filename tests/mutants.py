"""Break the code in one place at a time, in a copy of it, and see that a test fails: ``nox -s mutants [-- NAME ...]``.

A mutant that survives shows what no test would notice. One whose text is gone must be pointed at what took its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CSRC = "cuda_ext/csrc"


class Mutant(NamedTuple):
    """``old``, which is in the file once, becomes ``new``; one of the tests must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # what pytest takes


MUTANTS = (
    Mutant("a merge without its weights", "reference/tome_reference/merging.py",
           "_group_sum(x, groups, size / total.gather(1, slot.long()))",
           "_group_sum(x, groups, torch.ones_like(size) / total.gather(1, slot.long()))", "tests/test_merge.py"),
    Mutant("the last of equal pairs merges first", "reference/tome_reference/matching.py",
           "tied & (tied.cumsum(dim=1) <= r - merged.sum(dim=1, keepdim=True))",
           "tied & (tied.flip(1).cumsum(dim=1).flip(1) <= r - merged.sum(dim=1, keepdim=True))", "tests/test_match.py"),
    Mutant("slot maps composed the other way round", "reference/tome_reference/merging.py",
           "slot = step.gather(1, slot.long())", "slot = slot.gather(1, step.long())", "tests/test_restore.py"),
    Mutant("attention forgets sizes", "reference/tome_reference/attention.py",
           "bias = None if size is None else size_bias(size).to(q.dtype)", "bias = None", "tests/test_attention.py"),
    Mutant("a block forgets its LayerScale", "compat/tome/patch/plain.py",
           "return Branch(value, factor)", "return Branch(value)", "tests/test_block.py"),
    Mutant("a watched MultiheadAttention forgets sizes", "compat/tome/patch/mha.py",
           "key_padding_mask=None if bias is None else bias[:, 0, 0]", "key_padding_mask=None", "tests/test_mha.py"),
    Mutant("open_clip's norms return float32 under autocast", "compat/tome/patch/open_clip_vit.py",
           "plain.NORMS[type(part)] = True", "plain.NORMS[type(part)] = False", "tests/test_mha.py"),
    Mutant("a wrapper keeps r to itself", "compat/tome/patch/hosts.py",
           "for i in range(len(steps)):\n        hold", "for i in range(1):\n        hold", "tests/test_auto.py"),
    Mutant("a block forgets its sizes", "compat/tome/patch/block.py",
           "weights = tokens.weights(s.model.prop_attn)", "weights = None", "tests/test_timm.py"),
    Mutant("the grid is restored without what waits", "compat/tome/tokens.py",
           "value, gamma = (None, None) if branch is None else branch", "value, gamma = None, None",
           "tests/test_timm.py"),
    Mutant("twins share the map of one of them", "compat/tome/patch/diffusers_unet.py",
           "mean = (halves[0] + halves[1]) / 2", "mean = halves[0]", "tests/test_diffusers.py"),
    Mutant("cells at the edge draw as whole ones", "compat/tome/patch/grid.py",
           "(height - y).clamp(max=sy), (width - x).clamp(max=sx)", "torch.full_like(y, sy), torch.full_like(x, sx)",
           "tests/test_diffusers.py"),
    Mutant("all sources merge, however few were asked for", f"{CSRC}/match/match.cpp",
           "p.merged = static_cast<int>(r);\n  return run(p, keys);\n}\n\n}  // namespace tome",
           "p.merged = p.sources;\n  return run(p, keys);\n}\n\n}  // namespace tome", "tests/test_match_emulated.py"),
    Mutant("an inflection the other way round", "compat/tome/schedule.py",
           "math.trunc(mean * (1.0 - inflection))", "math.trunc(mean * (1.0 + inflection))", "tests/test_schedule.py"),
    Mutant("gradients of weight and bias change places", "cuda_ext/tome_cuda/registration.py",
           'shift, scale = launch("column_sums"', 'scale, shift = launch("column_sums"', "tests/test_norm.py"),
    Mutant("no barrier before counts are overwritten", f"{CSRC}/match/select.cuh",
           "    __syncthreads();  // the counts are overwritten by the next round\n", "",
           "tests/test_match_emulated.py"),
    Mutant("no barrier between metric and scores", f"{CSRC}/match/fused.cu",
           "  load_metric<T, kAligned>(p, b, shared);\n  __syncthreads();\n",
           "  load_metric<T, kAligned>(p, b, shared);\n", "tests/test_match_emulated.py"),
    Mutant("no barrier before members are read", f"{CSRC}/merge/members.cuh",
           "    }\n  });\n  __syncthreads();\n", "    }\n  });\n", "tests/test_merge_emulated.py"),
    Mutant("no barrier between sums of columns", f"{CSRC}/norm/columns.cu",
           "    __syncthreads();\n  }\n  if (warp > 0", "  }\n  if (warp > 0", "tests/test_norm_emulated.py"),
    Mutant("no barrier before slots are read", f"{CSRC}/restore/restore.cu",
           "  __syncthreads();\n", "", "tests/test_restore_emulated.py"),
    Mutant("no barrier before keys are overwritten", f"{CSRC}/attention/streamed.cu",
           "      __syncthreads();  // the next stage is full", "      // the next stage is full",
           "tests/test_attention_emulated.py"),
    Mutant("no barrier before queries are overwritten", f"{CSRC}/attention/backward_keys.cu",
           "    // now is free.\n    __syncthreads();\n", "", "tests/test_attention_backward.py"),
    Mutant("keys and values change gradients", "cuda_ext/tome_cuda/registration.py",
           "*split_packed(rest, heads, 2))", "*split_packed(rest, heads, 2)[::-1])",
           "tests/test_cuda_ops.py"),
    Mutant("a half forgets what stochastic depth leaves", f"{CSRC}/halves/training.cpp",
           "dropped(is_same ? x : other, drop)", "is_same ? x : other", "tests/test_halves.py"),
    Mutant("gradients of vectors change places", "cuda_ext/tome_cuda/training.py",
           "VECTORS = (6, 5, 4, 3, 1)", "VECTORS = (5, 6, 4, 3, 1)", "tests/test_training.py"),
    Mutant("a cast weight lies where another begins", f"{CSRC}/halves/training.cpp",
           "    used += padded(outputs * inputs);\n", "", "tests/test_training_emulated.py"),
    Mutant("no barrier between slabs", f"{CSRC}/norm/columns.cu",
           "  partial[warp][lane] = sum;\n  __syncthreads();\n", "  partial[warp][lane] = sum;\n",
           "tests/test_norm_emulated.py"),
    Mutant("a rate of dropping is not watched", "compat/tome/patch/plain.py",
           "self._entries.append((child.__dict__, rate, value))", "pass", "tests/test_training.py"),
    Mutant("one of three parts of a log size", "reference/tome_reference/attention.py",
           "for _ in range(3):", "for _ in range(1):", "tests/test_attention_backward.py"),
    Mutant("a later target wins a tie", f"{CSRC}/match/score.cuh",
           "index < columns && score[m][n][i] > best.score", "index < columns && score[m][n][i] >= best.score",
           "tests/test_match_emulated.py"),
    Mutant("one more of equal pairs merges", f"{CSRC}/match/select.cuh",
           "is_equal && equal_before < equal", "is_equal && equal_before <= equal", "tests/test_match_emulated.py"),
    Mutant("a kernel's merge without its weights", f"{CSRC}/merge/members.cuh",
           "list[base + i].weight = size[i];", "list[base + i].weight = 1.0f;", "tests/test_merge_emulated.py"),
    Mutant("a kernel follows slot maps backwards", f"{CSRC}/restore/restore.cu",
           "i = __ldg(chain.slot[k].data_ptr + chain.slot[k].offset(b, i));",
           "i = __ldg(chain.slot[chain.count - 1 - k].data_ptr + chain.slot[chain.count - 1 - k].offset(b, i));",
           "tests/test_restore_emulated.py"),
    Mutant("the gradient of a rotation turns the same way", f"{CSRC}/position/rotate.cu",
           "if (p.is_back) transpose(angles, p.is_half);", "", "tests/test_position_emulated.py"),
    Mutant("no barrier before the first members are read", f"{CSRC}/position/homes.cu",
           "  __syncthreads();  // every member has been counted\n", "", "tests/test_position_emulated.py"),
    Mutant("padding gives its place", "reference/tome_reference/position.py",
           "order = torch.where(valid, order, order + n)", "pass", "tests/test_position.py"),
    Mutant("the quick GELU is SiLU", f"{CSRC}/activation/activation.cu",
           "sigmoid<T>(1.702f * v[c])", "sigmoid<T>(v[c])", "tests/test_activation.py"),
    Mutant("a GELU that is fitted less well", f"{CSRC}/product/product.cpp",
           "{{-2.30128303f,", "{{-2.31128303f,", "tests/test_linear_gelu.py"),
    Mutant("a gradient of the other GELU", "cuda_ext/tome_cuda/registration.py",
           '"tanh" if ctx.is_tanh else "none"', '"none" if ctx.is_tanh else "none"', "tests/test_linear_gelu.py"),
    Mutant("the wrong half is the gate", "compat/tome/tokens.py",
           "(x, gate) if self.is_gate_last", "(gate, x) if self.is_gate_last",
           "tests/test_one_call.py"),
    Mutant("a head dimension less", f"{CSRC}/attention/attention.h",
           "{32, 64, 72, 80, 96, 128}", "{32, 64, 80, 96, 128}", "tests/test_attention_emulated.py"),
    Mutant("more shared memory than small GPUs have", f"{CSRC}/attention/streamed.cu",
           "kHeadDim <= 96 ? 3 : 2;", "3;", "tests/test_launches.py"),
    Mutant("a grant that was refused counts", f"{CSRC}/launch.cuh",
           "if (bytes <= most) return cudaSuccess;\n", "if (bytes <= most) return cudaSuccess;\n  most = bytes;\n",
           "tests/test_launches.py"),
    Mutant("any tensor counts as aligned", f"{CSRC}/merge/merge.cpp",
           "return is_aligned_view(x, dtype, channels) && is_aligned_view(out, dtype, channels);", "return true;",
           "tests/test_merge_emulated.py"),
    Mutant("statistics are read as they lie", f"{CSRC}/norm/norm.cpp",
           'TOME_CHECK(stats.is_contiguous(), "stats must be contiguous");', "", "tests/test_host_emulated.py"),
)  # fmt: skip


def copy(folder: Path) -> None:
    """What git would commit of this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def fails(folder: Path, *tests: str) -> bool:
    """Whether a test fails, or ends the process that runs it.

    Raises:
        RuntimeError: pytest finds nothing to run, or can't.

    """
    path = os.pathsep.join(str(folder / name) for name in ("reference", "compat", "cuda_ext"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode > 1:
        raise RuntimeError(f"pytest exits with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0


def main() -> int:
    """Try the mutants that are named, or all; how many survive."""
    chosen = [m for m in MUTANTS if len(sys.argv) == 1 or m.name in sys.argv[1:]]
    gone = [m for m in chosen if (ROOT / m.file).read_text().count(m.old) != 1]
    for m in gone:
        print(f"{m.name}: its text is not in {m.file}, or more than once")
    if gone or not chosen:
        return len(gone) or sys.exit("no such mutant")
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy(folder)
        if fails(folder, *sorted({m.tests for m in chosen})):
            sys.exit("the tests fail as it is: nothing can be learnt")
        for m in chosen:
            whole = (folder / m.file).read_text()
            (folder / m.file).write_text(whole.replace(m.old, m.new))
            is_seen = fails(folder, m.tests)
            (folder / m.file).write_text(whole)
            print(f"{'seen' if is_seen else 'SURVIVED'}: {m.name} ({m.file})", flush=True)
            survivors += not is_seen
    return survivors


if __name__ == "__main__":
    sys.exit(main())
