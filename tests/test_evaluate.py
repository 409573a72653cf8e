"""What is said of a schedule: sums against a direct computation, heads found, speeds, the Pareto front."""

import copy
import math
from types import SimpleNamespace

import models
import pytest
import timm
import torch
from torch import nn

from tome import data, evaluate, patch, use_backend
from tome.evaluate import COLUMNS, Outputs, Split, Tally

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reference(reference_without_gradients):
    pass


def outputs(batch, classes=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Outputs(*(torch.randn(batch, width, generator=generator) for width in (16, classes)))


def test_sums_are_those_of_a_direct_computation():
    base, out = outputs(50), outputs(50, seed=1)
    label = torch.randint(-1, 9, (50,), generator=torch.Generator().manual_seed(2))
    sums = dict(zip(COLUMNS, evaluate.compare(base, out, label).tolist(), strict=True))
    order = out.logits.argsort(dim=1, descending=True)
    assert sums["finite"] == 50
    assert sums["labelled"] == (label >= 0).sum() < 50
    assert sums["top1"] == sum(int(row[0] == one) for row, one in zip(order, label, strict=True))
    assert sums["top5"] == sum(int(one in row[:5]) for row, one in zip(order, label, strict=True)) > sums["top1"]
    assert sums["same_top1"] == (base.logits.argmax(dim=1) == out.logits.argmax(dim=1)).sum()
    p, q = (part.logits.double().softmax(dim=1) for part in (base, out))
    assert sums["kl"] / 2**32 == pytest.approx((p * (p / q).log()).sum().item(), abs=50 * 2**-32)
    a, b = (part.features.double() for part in (base, out))
    cosine = ((a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1)).sum().item()
    assert sums["cosine"] / 2**32 == pytest.approx(cosine, abs=50 * 2**-32)


def test_sums_do_not_depend_on_the_order():
    base, out, label = outputs(64), outputs(64, seed=1), torch.zeros(64, dtype=torch.int64)

    def rows(found, index):
        return Outputs(*(part[index] for part in found))

    total = evaluate.compare(base, out, label)
    parts = torch.randperm(64, generator=torch.Generator().manual_seed(3)).split([5, 40, 1, 18])
    assert torch.equal(total, sum(evaluate.compare(rows(base, i), rows(out, i), label[i]) for i in parts))


def test_images_without_finite_output_count_as_wrong():
    base, out = outputs(4), outputs(4)
    out.logits[1, 0], out.features[2, 3] = torch.nan, torch.inf
    label = out.logits.nan_to_num().argmax(dim=1)
    sums = dict(zip(COLUMNS, evaluate.compare(base, out, label).tolist(), strict=True))
    assert sums == {
        "finite": 2, "labelled": 4, "top1": 2, "top5": 2, "same_top1": 2, "cosine": 2 * 2**32, "kl": 0
    }  # fmt: skip
    tally = Tally(4, sums=[list(sums.values())], timed=[[4, 1.0, 0, 0.0]])
    (result,) = evaluate.results(tally, 9, True)
    assert (result.nonfinite, result.top1, result.cosine, result.same_top1) == (2, 0.5, 1.0, 1.0)


@pytest.mark.parametrize("name", ["plain", "dinov2", "siglip map", "mae avg", "avgmax"])
def test_features_are_those_that_enter_the_head(name):
    model, x = models.make(name), models.images()
    features, logits = model.forward_head(model.forward_features(x), pre_logits=True), model(x)
    split = Split(model, x)
    made = split(x)
    assert split.classes == 7
    assert torch.equal(made.features, features)
    assert torch.equal(made.logits, logits)


def test_models_without_a_head_and_with_two():
    x = models.images()
    bare = models.make("plain", num_classes=0)
    expected = bare(x)
    split = Split(bare, x)
    assert split.classes is None
    assert torch.equal(split(x).features, expected)
    assert split(x).logits is None
    two = models.make("deit distilled")
    expected = two(x)
    split = Split(two, x)
    assert split.classes == 7
    assert torch.equal(split(x).logits, expected)
    assert torch.equal(split(x).features, expected)


def test_heads_of_other_libraries():
    transformers = pytest.importorskip("transformers")
    vit = pytest.importorskip("torchvision").models.VisionTransformer(48, 8, 4, 2, 32, 64, num_classes=7).eval()
    x = models.images()
    nn.init.normal_(vit.heads.head.weight)
    expected = vit(x)
    split = Split(vit, x)
    assert torch.equal(split(x).logits, expected)
    assert split(x).features.shape == (2, 32)
    size = {"image_size": 48, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    config = transformers.ViTConfig(**size, intermediate_size=64, num_labels=7)
    model = transformers.ViTForImageClassification(config).eval()
    expected = model(x).logits, model.vit(x).last_hidden_state[:, 0]
    split = Split(model, x)
    assert torch.equal(split(x).logits, expected[0])
    assert torch.equal(split(x).features, expected[1])
    headless = transformers.ViTModel(config).eval()
    expected = headless(x).pooler_output
    split = Split(headless, x)
    assert (split.classes, split(x).logits) == (None, None)
    assert torch.equal(split(x).features, expected)
    plain = transformers.ViTModel(config, add_pooling_layer=False).eval()
    assert torch.equal(Split(plain, x)(x).features, plain(x).last_hidden_state[:, 0])


def variants_of(model, x, schedules):
    base = Split(model, x[:1])
    return {"unpatched": base} | {str(r): evaluate.twin(base, r) for r in schedules}


def batch_of(x, label, index):
    return data.Batch(x[index], label[index], index, [], index.tolist())


def evaluated(variants, batches, **options):
    total = Tally()
    for positions, tally in evaluate.evaluate(variants, batches, 8, CPU, **options):
        assert len(positions) == tally.images
        total.add(tally)
    return total


def test_schedules_against_the_unpatched_model():
    model = models.make("plain")
    x, label = torch.randn(20, 3, 48, 48), torch.arange(20) % 7
    expected = {}
    for r in (0, 4, (4, -1.0)):
        patched = patch.timm(copy.deepcopy(model))
        patched.r = r
        expected[str(r)] = patched(x)
    variants = variants_of(model, x, (0, 4, (4, -1.0)))
    weights = {id(p) for p in variants["unpatched"].parameters()}
    assert weights == {id(p) for p in variants["4"].parameters()}
    batches = [batch_of(x, label, index) for index in torch.arange(20).split(8)]
    total = evaluated(variants, batches)
    rows = dict(zip(variants, evaluate.results(total, 7, True), strict=True))
    assert total.images == 20
    assert rows["unpatched"].speedup == 1.0
    for name in ("unpatched", "0"):  # the reference's bits
        assert (rows[name].cosine, rows[name].kl, rows[name].same_top1) == (1.0, 0.0, 1.0)
    for name, logits in expected.items():
        assert rows[name].top1 == (logits.argmax(dim=1) == label).double().mean()
        assert rows[name].speedup == pytest.approx(total.rate(list(variants).index(name)) / total.rate(0))
        log_p, log_q = (each.double().log_softmax(dim=1) for each in (expected["0"], logits))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1).mean().item()
        assert rows[name].kl == pytest.approx(kl, rel=1e-4, abs=1e-9)
    assert 0.5 < rows["4"].cosine < 1.0
    assert rows["4"].kl > 0
    assert [row[0] for row in total.timed] == [16] * 4, "the last batch is not full"
    assert [row[2] for row in total.timed] == [4] * 4


def test_batches_that_are_not_full_run_padded():
    model, x = models.make("plain"), torch.randn(11, 3, 48, 48)
    variants = variants_of(model, x, (4,))
    sizes = []
    counted = {name: lambda y, f=f: sizes.append(len(y)) or f(y) for name, f in variants.items()}
    label = torch.zeros(11, dtype=torch.int64)
    batches = [batch_of(x, label, index) for index in torch.arange(11).split(8)]
    padded, plain = evaluated(counted, batches, padded=True), evaluated(variants, batches)
    assert set(sizes) == {8}
    assert padded.images == plain.images == 11
    assert padded.timed[0][0] == 16
    for a, b in zip(padded.sums, plain.sums, strict=True):
        assert a[:5] == b[:5]
        assert a[5:] == pytest.approx(b[5:], rel=1e-4, abs=1e5)


def test_a_batch_of_broken_images_counts_as_broken():
    empty = data.Batch(torch.empty(0), torch.empty(0), torch.empty(0), ["a.png", "b.png"], [0, 1])
    ((positions, tally),) = evaluate.evaluate({"unpatched": None}, [empty], 8, CPU)
    assert (positions, tally.images, tally.broken) == ([0, 1], 0, ["a.png", "b.png"])


def test_speeds_are_of_full_batches_where_there_are_any():
    assert Tally(timed=[[100, 2.0, 3, 9.0]]).rate(0) == 50
    assert Tally(timed=[[0, 0.0, 3, 1.0]]).rate(0) == 3
    assert math.isnan(Tally(timed=[[0, 0.0, 0, 0.0]]).rate(0))


def test_the_front_of_what_nothing_beats():
    points = [(10, 90), (20, 89), (15, 80), (20, 88), (30, 70), (5, 90), (30, 70)]
    assert evaluate.pareto(points) == [4, 1, 0]


@pytest.mark.parametrize(("most", "room", "found"), [(64, 1000, 64), (64, 40, 32), (48, 1000, 32), (64, 1, 1)])
def test_the_largest_batch_that_fits(monkeypatch, most, room, found):
    peak = [0]
    fake = {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 7,
        "max_memory_allocated": lambda device: 7 + peak[0],
        "mem_get_info": lambda device: (1.25 * room, 10_000),
    }
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**fake))
    tried = []

    def run(size):
        tried.append(size)
        if size > 1.25 * room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        peak[0] = size

    assert evaluate.largest_batch(run, most, torch.device("cuda")) == found
    assert max(tried) <= most


def test_not_even_one_image():
    def run(size):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate.largest_batch(run, 64, torch.device("cuda"))


def test_models_inside_of_wrappers():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = timm.create_model("test_vit", num_classes=10).eval()

        def forward(self, x):
            return self.inside(x)

    model, x = Wrapper(), torch.randn(2, 3, 160, 160)
    expected = model(x)
    base = Split(model, x)
    with use_backend("reference"):
        assert torch.equal(evaluate.twin(base, 0)(x).logits, expected)
        assert not torch.equal(evaluate.twin(base, 8)(x).logits, expected)


def test_a_compiled_split_is_one_graph():
    x = models.images()
    base = Split(models.make("plain"), x)
    compiled = {
        r: torch.compile(evaluate.twin(base, r), backend="eager", fullgraph=True, dynamic=False) for r in (0, 4)
    }
    assert torch.equal(compiled[0](x).logits, base(x).logits)
    assert torch.equal(compiled[4](x).features, evaluate.twin(base, 4)(x).features)
