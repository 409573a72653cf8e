"""The programs in examples/, each on something small: what they print is what the library gives, computed by hand."""

import copy
import re
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pages import PAGES, ROOT, commands, words
from PIL import Image
from programs import COLOURS, digits_vit, photos, run, vit
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import tome
from examples import benchmark, dense, train, validate, visualize
from tome import cost, data, measure, vis
from tome.cli import models
from tome.tokens import kept

__all__ = ["photos"]
pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = PAGES["docs/examples.md"]


@pytest.fixture
def small():
    torch.manual_seed(0)
    return vit().eval()


def merging(model, r):
    twin = tome.patch.auto(copy.deepcopy(model))
    twin.r = r
    return twin


@torch.inference_mode()
def test_validation_counts_what_is_right(small, photos):
    images = data.open_images(str(photos), data.pixels(small))
    whole = next(data.batches(images, 15, 0, torch.device("cpu")))
    answers = {r: merging(small, r)(whole.x).argmax(dim=1) for r in (0, 4, 12)}
    small.head.bias[answers[0].mode().values] -= 0.02  # else all get one answer
    answers = {r: merging(small, r)(whole.x).argmax(dim=1) for r in (0, 4, 12)}
    found = validate.validate(copy.deepcopy(small), images, (0, 4, 12), batch_size=4)
    assert list(found) == ["unpatched", "r = 0", "r = 4", "r = 12"]
    for r, answer in answers.items():
        result = found[f"r = {r}"]
        assert result.top1 == pytest.approx((answer == whole.label).float().mean().item())
        assert result.same_top1 == pytest.approx((answer == answers[0]).float().mean().item())
    assert found["unpatched"].top1 == found["r = 0"].top1
    assert 1 - found["r = 0"].cosine < 1e-6 < 1 - found["r = 12"].cosine


def test_validation_prints_a_line_for_each_schedule(photos):
    lines = run(validate, photos, "--model", "programs:vit", "--r", 0, "--r", "8,-1.0", "--limit", 6)
    assert [line[:14].strip() for line in lines[1:]] == ["unpatched", "r = 0", "r = (8, -1.0)"]
    assert lines[1].split()[1:4] == lines[2].split()[3:6]  # top-1, agreement, cosine
    assert lines[1].endswith(" 1.00x")
    assert lines[0] in PAGE


def test_the_benchmark_takes_medians_of_models_that_merge(small, monkeypatch):
    def time_calls(calls, device, warm_up, runs, progress):
        """A millisecond for each token that leaves the last block; each model has one slow pass."""
        seconds = {}
        with torch.inference_mode():
            for name, call in calls.items():
                with kept() as found:
                    call()
                seconds[name] = [1.0, *[1e-3 * (found[-1].count() if found else 65)] * (runs - 1)]
        return seconds

    monkeypatch.setattr(measure, "time_calls", time_calls)
    found = benchmark.benchmark(small, (4, 12), batch_size=2, runs=5)
    assert list(found) == ["unpatched", "r = 4", "r = 12"]
    assert [each.images_per_second for each in found.values()] == pytest.approx([2 / (1e-3 * n) for n in (65, 49, 17)])
    assert [each.speedup for each in found.values()] == pytest.approx([1, 65 / 49, 65 / 17])
    assert found["r = 12"].allowed == pytest.approx(cost.flops(small) / cost.flops(small, 12))
    lines = run(benchmark, "--model", "programs:vit", "--r", 12, "--batch-size", 2, "--device", "cpu")
    assert lines[1] in PAGE
    assert lines[-1].split() == ["r", "=", "12", "117.6", "3.82x", f"{found['r = 12'].allowed:.2f}x"]


def test_the_benchmark_measures(small):
    found = benchmark.benchmark(small, (12,), batch_size=2, runs=2)
    assert all(each.images_per_second > 0 for each in found.values())


def test_pictures_are_those_of_the_merged_patches(small, photos, tmp_path):
    with Image.open(photos / "ant" / "0.png") as photo:
        whole, *drawn = visualize.pictures(tome.patch.timm(small), photo, (4, 8))
    assert [caption for _, caption in (whole, *drawn)] == ["65 tokens", "r = 4: 49 tokens", "r = 8: 33 tokens"]
    pixels = data.pixels(small)
    seen = pixels(photo)
    image = Image.fromarray(seen.permute(1, 2, 0).numpy())
    with torch.inference_mode():
        slot = tome.merged(small, pixels.normalised(seen[None])).slot  # r is still 8
    assert np.array_equal(drawn[1][0], vis.draw(image, slot, (8, 8)))
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    assert whole[0].size == drawn[0][0].size == (448, 448)
    out = tmp_path / "merged.png"
    files = (photos / "ant" / "0.png", photos / "bee" / "1.png")
    *told, last = run(visualize, *files, "--model", "programs:vit", "--r", 8, "--out", out)
    assert told == ["0.png: 65 tokens, r = 8: 33 tokens", "1.png: 65 tokens, r = 8: 33 tokens"]
    assert last == f"picture: {out}"
    with Image.open(out) as sheet:
        assert sheet.width > 2 * 448
        assert sheet.height > 2 * 448


def test_mosaics_and_their_masks():
    colours = torch.tensor([[10, 20, 30], [40, 50, 60], [70, 80, 90]], dtype=torch.uint8)
    images, masks = dense.mosaics(colours[:, :, None, None].expand(-1, -1, 20, 20), 4, 16, seed=0)
    assert images.shape == (4, 3, 16, 16)
    assert torch.equal(images, colours[masks].permute(0, 3, 1, 2))
    assert all(mask.unique().tolist() == [0, 1, 2] for mask in masks)
    assert not torch.equal(masks, dense.mosaics(colours[:, :, None, None].expand(-1, -1, 20, 20), 4, 16, seed=1)[1])


def test_dense_features_are_on_the_full_grid(small):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        plain = small.forward_features(data.pixels(small).normalised(images))[:, 1:]
    patched = tome.patch.timm(copy.deepcopy(small))
    assert_close(dense.features(patched, images, 0).flatten(2).mT, plain)
    grid = dense.features(patched, images, 8)
    assert grid.shape == (3, 48, 8, 8)
    assert [len(each.flatten(1).unique(dim=1).T) for each in grid] == [33 - 1] * 3  # 32 of them merged


def test_intersection_over_union():
    found = torch.tensor([[[0, 0], [1, 1]]])
    masks = torch.tensor([[[0, 1], [1, 1]]])
    scores = torch.nn.functional.one_hot(found).permute(0, 3, 1, 2).float()
    assert dense.mean_iou(torch.nn.Identity(), scores, masks, 2) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_head_on_restored_features_tells_photographs_apart(photos, monkeypatch):
    monkeypatch.setattr(models, "find_device", lambda name: torch.device("cpu"))  # figures to the digit
    files = [photos / name / "0.png" for name in COLOURS]
    head, *rows = run(dense, *files, "--model", "programs:vit", "--r", 4, "--r", "[8, 8]", "--count", 12)
    assert head in PAGE
    assert [row[:10].strip() for row in rows] == ["0", "4", "[8, 8]"]
    own, unmerged = torch.tensor([[float(share) for share in re.findall(r"([\d.]+)%", row)] for row in rows]).T.tolist()
    assert own[0] == unmerged[0] > 70
    assert min(own) > 60
    assert own[1:] != unmerged[1:]


def test_a_plain_loop_trains_a_model_that_merges(tmp_path):
    out = tmp_path / "model.pt"
    options = ("--model", "programs:digits_vit", "--r", 3, "--epochs", 6, "--lr", 5e-3, "--device", "cpu")
    *epochs, last = run(train, "digits", *options, "--out", out)
    assert last == f"weights: {out}"
    assert len(epochs) == 6
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in epochs]
    assert losses[-1] < 0.6 * losses[0]
    merged, unmerged = map(float, re.findall(r"([\d.]+)%", epochs[-1]))
    assert min(merged, unmerged) > 50
    plain = digits_vit().eval()
    plain.load_state_dict(torch.load(out))
    digits = data.open_images("digits", data.pixels(plain))
    with torch.inference_mode():
        for model, told in ((plain, unmerged), (merging(plain, 3), merged)):
            batches = data.batches(digits, 64, 0, torch.device("cpu"))  # in those of the program: rounding is the same
            right = torch.cat([model(batch.x).argmax(dim=1) == batch.label for batch in batches])
            assert right.float().mean().item() == pytest.approx(told / 100, abs=1e-3)


def test_a_plain_loop_merges_in_its_steps_and_takes_folders(photos, tmp_path, monkeypatch):
    (tmp_path / "train").symlink_to(photos)
    (tmp_path / "val").symlink_to(photos)
    seen, forward = set(), VisionTransformer.forward_head

    def watched(self, x, *args, **kwargs):
        seen.add((self.training, self.r))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward_head", watched)
    monkeypatch.chdir(tmp_path)
    run(train, ".", "--model", "programs:vit", "--r", 5, "--epochs", 1, "--batch-size", 4, "--device", "cpu")
    assert seen == {(True, 5), (False, 5), (False, 0)}
    assert torch.load("model.pt")["head.weight"].shape == (3, 48)


@pytest.mark.parametrize("program", [validate, visualize, dense, train])
def test_weights_are_pretrained_unless_told_otherwise(program, photos, monkeypatch):
    def load(name, pretrained=False, device="cpu"):
        raise click.UsageError(f"{name} {pretrained}")

    monkeypatch.setattr(models, "load", load)
    at = photos / "ant" / "0.png" if program in (visualize, dense) else photos if program is validate else "digits"
    for flags, pretrained in (((), True), (("--random-weights",), False)):
        result = CliRunner().invoke(program.main, [str(at), *flags])
        assert f"vit_small_patch16_224 {pretrained}" in result.output


def test_examples_are_short_and_have_a_place_on_their_page():
    for file in (ROOT / "examples").glob("*.py"):
        assert file.name == "finetune.py" or len(file.read_text().splitlines()) < 100, file
        assert file.name in PAGE, file


@pytest.mark.parametrize("command", [each for each in commands("docs/examples.md") if each.startswith("python ")])
def test_commands_of_the_page_are_taken(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, file, *arguments = words(command)
    for name in arguments:
        if name.endswith((".jpg", ".png", ".gif")):
            Path(name).touch()
    if Path(file).stem in ("clip_zero_shot", "video"):
        pytest.importorskip("open_clip")
        pytest.importorskip("transformers")
    program = import_module(f"examples.{Path(file).stem}")
    program.main.make_context(file, arguments)
