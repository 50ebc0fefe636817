"""Sets of pixels: flat indices to pixels and back, and the r-th kept pixel."""

import pytest
import torch

from components.pixel_sets import PixelSet, pixel_batch


@pytest.mark.parametrize("n", [1, 63, 64, 65, 257, 5000])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_select_equals_indexing_the_list_of_kept_pixels(n, share):
    kept = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    kept[n // 2] = True
    pixels, members = PixelSet(n, kept), kept.nonzero()[:, 0]
    assert pixels.count == len(members)
    assert torch.equal(pixels.select(torch.arange(len(members))), members)
    shuffled = torch.randint(0, len(members), (77,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(pixels.select(shuffled), members[shuffled])


@pytest.mark.parametrize("where", [slice(0, 1), slice(-1, None), slice(300, 301), slice(512, 768), slice(256, 1100)])
def test_select_skips_blocks_without_kept_pixels(where):
    kept = torch.zeros(1500, dtype=torch.bool)
    kept[where] = True
    pixels = PixelSet(1500, kept)
    assert torch.equal(pixels.select(torch.arange(pixels.count)), kept.nonzero()[:, 0])


def test_without_a_filter_or_with_all_kept_the_rank_is_the_index():
    rank = torch.tensor([0, 7, 999])
    for pixels in (PixelSet(1000), PixelSet(1000, torch.ones(1000, dtype=torch.bool))):
        assert pixels.count == 1000
        assert torch.equal(pixels.select(rank), rank)


@pytest.mark.parametrize("pixels", [(0, None), (600, torch.zeros(600, dtype=torch.bool))])
def test_an_empty_set_is_refused(pixels):
    with pytest.raises(ValueError, match="no pixel"):
        PixelSet(*pixels)


def test_flat_indices_run_over_images_then_rows_then_columns_and_give_pixel_centres():
    height, width, n_images = 5, 7, 3
    batch = pixel_batch(torch.arange(n_images * height * width), height, width)
    grid = [(i, c + 0.5, r + 0.5) for i in range(n_images) for r in range(height) for c in range(width)]
    image, x, y = (torch.tensor(values) for values in zip(*grid, strict=True))
    assert torch.equal(batch.image_id, image)
    assert torch.equal(batch.xy, torch.stack([x, y], -1))
    assert (batch.image_id.dtype, batch.xy.dtype) == (torch.int64, torch.float32)


def test_pixels_beyond_two_billion_keep_their_exact_place():
    """100 images of 8000 x 6000 are more pixels than 32 bits hold."""
    height, width = 6000, 8000
    batch = pixel_batch(torch.tensor([99 * height * width + 5999 * width + 7999]), height, width)
    assert batch.image_id.tolist() == [99]
    assert batch.xy.tolist() == [[7999.5, 5999.5]]
