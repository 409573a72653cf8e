"""Pictures of merged patches."""

import numpy as np
import pytest
import torch
from PIL import Image

from tome.utils import adjacency
from tome.vis import draw, generate_colormap, make_visualization, sheet


def photograph(width=32, height=24):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SLOT = torch.tensor([[0, 1, 1, 2, 3, 1, 1, 4, 4, 5, 6, 7, 7]], dtype=torch.int32)  # class token, 3 x 4 patches


def test_groups_are_filled_with_their_mean_colour_and_outlined():
    image = photograph()
    drawn = np.asarray(make_visualization(image, SLOT, patch_size=8)).astype(int)
    assert drawn.shape == (24, 32, 3)
    group = SLOT[0, 1:].view(3, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    inside = np.zeros_like(group, dtype=bool)
    inside[1:-1, 1:-1] = True
    for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
        inside &= group == np.roll(group, shift, axis)
    for m in range(1, 8):
        mean = np.asarray(image)[group == m].mean(axis=0).round()
        assert np.abs(drawn[(group == m) & inside] - mean).max() <= 1
    assert (drawn[0, 15] != drawn[0, 8]).any(), "a border pixel has another colour than the inside of its group"
    assert (drawn[7, 20] == 0).all(), "a patch on its own has a black outline"


def test_an_adjacency_matrix_and_a_slot_map_give_the_same_picture():
    expected = make_visualization(photograph(), SLOT, 8).tobytes()
    for source in (SLOT[0], adjacency(SLOT), adjacency(SLOT)[0]):
        assert make_visualization(photograph(), source, 8).tobytes() == expected


def test_prefixes():
    patches = SLOT[:, 1:]
    expected = make_visualization(photograph(), SLOT, 8).tobytes()
    assert make_visualization(photograph(), patches, 8, class_token=False).tobytes() == expected
    registers = torch.cat([torch.tensor([[8, 9, 10]]), patches], dim=1)
    assert make_visualization(photograph(), registers, 8, prefix=3).tobytes() == expected


@pytest.mark.parametrize(
    ("source", "kwargs", "message"),
    [
        (SLOT, {"patch_size": 16}, "12 patches of 16 pixels"),
        (SLOT, {"patch_size": 7}, "do not tile an image of 32 x 24 pixels"),
        (SLOT, {"patch_size": 8, "class_token": False}, "13 patches"),
        (SLOT.expand(2, -1), {"patch_size": 8}, "of one image, got a batch of 2"),
        (SLOT[0, 0], {"patch_size": 8}, "must be a slot map"),
    ],
)
def test_what_does_not_fit_is_refused(source, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_visualization(photograph(), source, **kwargs)


@pytest.mark.parametrize(("least", "side"), [(24, 8), (25, 9), (300, 100)])
def test_a_drawing_has_square_patches_of_a_size_that_is_asked_for(least, side):
    image = Image.new("RGB", (32, 24), (10, 20, 30))
    drawn = np.asarray(draw(image, SLOT, (3, 4), least))
    assert drawn.shape == (3 * side, 4 * side, 3)
    thickness = max(1, side // 14)
    middle = drawn[side // 2, 2 * side - thickness - 1]
    assert (middle == (10, 20, 30)).all()
    assert (drawn[side // 2, 2 * side - thickness : 2 * side] != middle).any(axis=1).all()
    assert (drawn[side - 1, 2 * side + side // 2] == 0).all(), "a patch on its own"
    assert (drawn[side - 2, 2 * side + side // 2] == (10, 20, 30)).all(), "is outlined by one pixel"


def test_a_drawing_is_that_of_the_image_s_own_size_where_that_is_asked_for():
    expected = make_visualization(photograph(), SLOT, 8).tobytes()
    for slot in (SLOT, SLOT[:, 1:], adjacency(SLOT), torch.cat([torch.tensor([[8, 9]]), SLOT], dim=1)):
        assert draw(photograph(), slot, (3, 4), least=24).tobytes() == expected


@pytest.mark.parametrize("grid", [(4, 4), (0, 4)])
def test_a_grid_of_more_patches_than_tokens_is_refused(grid):
    with pytest.raises(ValueError, match=f"13 tokens, too few for a grid of {grid[0]} x {grid[1]} patches"):
        draw(photograph(), SLOT, grid)


def test_a_sheet_holds_every_picture_in_its_row():
    pictures = [Image.new("RGB", (10 + i, 20), (i, 0, 0)) for i in range(3)]
    plain = np.asarray(sheet([[(pictures[0], ""), (pictures[1], "")], [(pictures[2], "")]]))
    assert plain.shape == (48, 29, 3)
    assert (plain[:20, :10] == (0, 0, 0)).all()
    assert (plain[:20, 10:18] == 255).all()
    assert (plain[:20, 18:] == (1, 0, 0)).all()
    assert (plain[28:, :12] == (2, 0, 0)).all()
    captioned = np.asarray(sheet([[(pictures[0], "layer 3")], [(pictures[0], "")]]))
    assert captioned.shape[0] > 48
    assert (captioned[20:48] < 100).any(), "the caption is below its picture"
    with pytest.raises(ValueError, match="no pictures"):
        sheet([])


def test_colours():
    colours = generate_colormap(50)
    assert colours == generate_colormap(50, seed=0)
    assert colours != generate_colormap(50, seed=1)
    assert len(set(colours)) == 50
    assert all(0.0 <= channel <= 1.0 for colour in colours for channel in colour)
