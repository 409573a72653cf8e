"""The programs in examples/ for models of open_clip and transformers, on small ones."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from pages import PAGES
from PIL import Image
from programs import photos, run

import tome

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
from examples import clip_zero_shot, video  # noqa: E402 - they import what may be missing

__all__ = ["photos"]
pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "layers": 4, "width": 64, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
VIDEO = {
    "image_size": 24, "patch_size": 8, "num_frames": 8, "tubelet_size": 2, "hidden_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 2, "intermediate_size": 96, "id2label": {0: "walking", 1: "running"},
}  # fmt: skip


@pytest.fixture
def small_clip(tmp_path):
    (tmp_path / "small-clip.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(tmp_path)
    return "small-clip"


def test_zero_shot_answers_are_those_of_the_model(small_clip):
    torch.manual_seed(0)
    model = open_clip.create_model(small_clip).eval()
    images, texts = torch.randn(3, 3, 32, 32), open_clip.get_tokenizer(small_clip)(["a cat", "a temple"])
    with torch.inference_mode():
        image, text, scale = model(images, texts)
        expected = (scale * image @ text.T).softmax(dim=-1)
        twin = tome.patch.open_clip(copy.deepcopy(model))
        twin.r = 12
        merged = twin.encode_image(images, normalize=True)
        other = (scale * merged @ text.T).softmax(dim=-1)
    whole, few = clip_zero_shot.zero_shot(model, images, texts, (12,)).values()
    torch.testing.assert_close(whole.shares, expected)
    torch.testing.assert_close(few.shares, other)
    assert whole.cosine == pytest.approx(1)
    assert few.cosine == pytest.approx((merged * image).sum(dim=-1).mean().item())
    assert few.cosine < 1 - 1e-5
    assert min(whole.seconds, few.seconds) > 0


def test_zero_shot_prints_the_best_label_of_each_photograph(small_clip, photos):
    files = (photos / "ant" / "0.png", photos / "bee" / "0.png")
    head, *rows = run(clip_zero_shot, *files, "--model", small_clip, "--random-weights", "--label", "a cat", "--r", 4)
    assert head in PAGES["docs/examples.md"]
    assert [row[:14].strip() for row in rows] == ["unpatched", "r = 4"]
    assert all(row.endswith("0.png a cat 100%, 0.png a cat 100%") for row in rows)  # there is no other


def test_zero_shot_takes_the_weights_of_its_model(photos, monkeypatch):
    made = []

    def create(name, pretrained):
        made.append((name, pretrained))
        raise KeyboardInterrupt

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for flags in ((), ("--random-weights",)):
        CliRunner().invoke(clip_zero_shot.main, [str(photos / "ant" / "0.png"), *flags])
    assert made == [("ViT-B-16", "datacomp_xl_s13b_b90k"), ("ViT-B-16", None)]


@pytest.fixture
def film(tmp_path):
    """A GIF whose frames grow brighter."""
    frames = [Image.new("L", (40, 30), 16 * i) for i in range(16)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    return tmp_path / "film.gif"


def test_frames_of_a_clip(film, photos, tmp_path):
    x = video.clip(film, 4, 24)
    assert x.shape == (1, 4, 3, 24, 24)
    grey = (x[0, :, :, 5, 5] * torch.tensor(video.STD) + torch.tensor(video.MEAN)) * 255
    torch.testing.assert_close(grey, torch.tensor([0.0, 64, 128, 192])[:, None].expand(-1, 3), atol=1.5, rtol=0)
    (tmp_path / "frames").mkdir()
    with Image.open(film) as opened:
        for i in range(16):
            opened.seek(i)
            opened.convert("L").save(tmp_path / "frames" / f"{i:02}.png")
    torch.testing.assert_close(video.clip(tmp_path / "frames", 4, 24), x, atol=0.02, rtol=0)
    Image.linear_gradient("L").rotate(90).resize((72, 24)).save(tmp_path / "photo.png")
    light = video.clip(tmp_path / "photo.png", 4, 24).mean(dim=(0, 2, 3, 4))
    assert light.diff().abs().min() > 0.5  # the camera pans


def answer(row):
    """Everything but the seconds."""
    return row[:14].strip(), *row[14:].split()[1:]


def test_a_video_is_classified_with_and_without_merging(tmp_path):
    (film := tmp_path / "frames").mkdir()
    for i in range(8):
        Image.effect_noise((24, 24), 20 + 20 * i).save(film / f"{i}.png")
    config = transformers.VideoMAEConfig(**VIDEO)
    torch.manual_seed(0)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    for weight in (each for each in model.parameters() if each.dim() > 1):
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(tmp_path / "small")
    x = video.clip(film, 8, 24)
    head, *rows = run(video, film, "--model", tmp_path / "small", "--r", 4, "--device", "cpu")
    patched = tome.patch.transformers(copy.deepcopy(model))
    expected = []
    with torch.inference_mode():
        base = model(x).logits
        for r, name in ((0, "unpatched"), (4, "r = 4")):
            patched.r = r
            logits = patched(x).logits
            share, best = logits.softmax(dim=-1).max(dim=-1)
            cosine = torch.cosine_similarity(logits, base).item()
            told = ("walking", "running")[best.item()]
            expected.append((name, f"{cosine:.4f}", told, f"{share.item():.0%}"))
    assert head in PAGES["docs/examples.md"]
    assert [answer(row) for row in rows] == expected
    assert expected[0][1] == "1.0000" != expected[1][1]
    rows = run(video, film, "--model", tmp_path / "small", "--r", 4, "--device", "cpu", "--random-weights")
    assert [answer(row) for row in rows[1:]] != expected
