"""The names and meanings of the original package: scripts written for it run unchanged."""

import pytest
import torch
from models import images, make
from PIL import Image

import tome
from tome.merge import (
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)

METRIC = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(1))


def groups(unmerge, tokens):
    """Which inputs went into each output, read off the pair of functions alone."""
    index = torch.arange(tokens).float().expand(2, -1)[:, :, None]
    return unmerge(index)[:, :, 0].long()


@pytest.mark.parametrize(
    ("matching", "tokens"),
    [
        (lambda: bipartite_soft_matching(METRIC, 4), 9),
        (lambda: bipartite_soft_matching(METRIC, 4, class_token=True), 9),
        (lambda: bipartite_soft_matching(METRIC, 4, class_token=True, distill_token=True), 9),
        (lambda: kth_bipartite_soft_matching(METRIC, 3), 4),
        (lambda: random_bipartite_soft_matching(METRIC, 5), 8),
    ],
)
def test_modes_reduce_each_group(matching, tokens):
    merge, unmerge = matching()
    slot = groups(unmerge, tokens)
    for b in range(2):
        for m in range(tokens):
            members = X[b][slot[b] == m]
            torch.testing.assert_close(merge(X)[b, m], members.mean(0))
            torch.testing.assert_close(merge(X, mode="sum")[b, m], members.sum(0))
            torch.testing.assert_close(merge(X, "amax")[b, m], members.amax(0))
    assert merge(X).shape == (2, tokens, 5)
    with pytest.raises(ValueError, match="mode must be mean, sum or amax, got 'median'"):
        merge(X, "median")


@pytest.mark.parametrize("matching", [bipartite_soft_matching, random_bipartite_soft_matching])
@pytest.mark.parametrize("r", [0, -3])
def test_nothing_to_merge_is_the_identity(matching, r):
    merge, unmerge = matching(METRIC, r)
    assert merge(X, mode="amax") is X
    assert unmerge(X) is X


def test_r_is_capped_at_half():
    merge, _ = bipartite_soft_matching(METRIC, 100, class_token=True)
    assert merge(X).shape[1] == 13 - 6


def test_the_class_and_distillation_tokens_stay_first():
    merge, _ = bipartite_soft_matching(METRIC, 5, class_token=True, distill_token=True)
    assert torch.equal(merge(X)[:, :2], X[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_wavg_weighs_by_size_over_several_merges(dtype):
    x, size, source = X.to(dtype), None, None
    for r in (4, 3, 2):
        merge, _ = bipartite_soft_matching(x.float(), r, class_token=True)
        source = merge_source(merge, x, source)
        x, size = merge_wavg(merge, x, size)
        assert x.dtype == dtype
    assert size.shape == (2, 4, 1)
    assert torch.equal(source.sum(1), torch.ones(2, 13))
    assert torch.equal(source.sum(2), size[:, :, 0])
    expected = source @ X.to(dtype).float() / size
    torch.testing.assert_close(x.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_a_script_for_the_original_package():
    model = make("plain")
    tome.patch.timm(model, trace_source=True, prop_attn=True)
    assert model.r == 0
    for r in (4, (4, -1.0), [3, 3]):
        model.r = r
        model.eval()(images(1))
        info = model._tome_info
        source = info["source"]
        assert source.shape == (1, 37 - sum(info["r"]), 37)
        assert torch.equal(source.sum(1), torch.ones(1, 37))
        assert torch.equal(source.sum(2), info["size"][:, :, 0])
    assert info["trace_source"] is True
    assert info["prop_attn"] is True
    assert info["class_token"] is True
    assert info["distill_token"] is False
    picture = tome.vis.make_visualization(Image.new("RGB", (48, 48)), source, patch_size=8, class_token=True)
    assert picture.size == (48, 48)
    with pytest.raises(TypeError):
        info["size"] = None


def test_info_without_trace():
    model = tome.patch.timm(make("deit distilled"))
    assert model._tome_info["size"] is None
    model.r = 4
    model(images())
    assert model._tome_info["source"] is None
    assert model._tome_info["size"].shape == (2, 38 - 16, 1)
    assert model._tome_info["distill_token"] is True


def test_prop_attn_can_be_switched_off():
    with_sizes, without = tome.patch.timm(make("plain")), tome.patch.timm(make("plain"), prop_attn=False)
    with_sizes.r = without.r = 6
    assert not torch.allclose(with_sizes(images()), without(images()), atol=1e-4)


def test_benchmark(capsys):
    model = make("plain")
    assert tome.utils.benchmark(model, "cpu", (3, 48, 48), batch_size=2, runs=8, throw_out=0.25) > 0
    assert capsys.readouterr().out == ""
    tome.utils.benchmark(model, "cpu", (3, 48, 48), batch_size=2, runs=4, use_fp16=True, verbose=True)
    assert "im/s" in capsys.readouterr().out
    with pytest.raises(ValueError, match="runs >= 1"):
        tome.utils.benchmark(model, "cpu", (3, 48, 48), runs=0)
    with pytest.raises(ValueError, match="device 'tpu9' is not supported"):
        tome.utils.benchmark(model, "tpu9")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_without_the_gpu_it_asks_for():
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and none is available: use cpu"):
        tome.utils.benchmark(make("plain"))
