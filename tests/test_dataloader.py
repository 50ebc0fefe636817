"""Every format against the reference's numbers, and what loading promises about images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from components.cameras import image_rays
from dataLoader import load_scene, scene_folder, scene_names
from dataLoader.images import decode_images, probe_images
from dataLoader.problems import Problems

GOLDEN = Path(__file__).parent / "golden"
SCENES = GOLDEN / "scenes"
SHARED = Path(__file__).parents[2] / "shared" / "data"
FORMATS = {
    "syn": ("blender", "tiny", 1),
    "nsvf": ("nsvf", "Tiny", 1),
    "tt": ("tankstemple", "Tiny", 1),
    "llff": ("llff", "tiny", 4),
    "own_data": ("own_data", "tiny", 1),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "scenes.npz") as arrays:
        return dict(arrays)


def load(dataset, split, downsample=None, **options):
    _, name, default = FORMATS[dataset]
    return load_scene(dataset, SCENES, name, split, downsample or default, progress=False, **options)


def all_rays(scene):
    rays = [image_rays(scene, scene.c2w[i], scene.intrinsics[i]) for i in range(scene.n_images)]
    return torch.cat([torch.cat([r.origins, r.directions], -1) for r in rays]).numpy()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dataset", FORMATS)
def test_scene_equals_the_references(dataset, split, golden):
    scene, key = load(dataset, split), f"{FORMATS[dataset][0]}/{split}"
    np.testing.assert_allclose(all_rays(scene), golden[f"{key}/all_rays"].reshape(-1, 6), rtol=1e-4, atol=1e-5)
    colours = torch.stack([scene.image_rgb(i) for i in range(scene.n_images)]).numpy()
    np.testing.assert_allclose(colours.reshape(-1, 3), golden[f"{key}/all_rgbs"].reshape(-1, 3), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scene.aabb.numpy(), golden[f"{key}/scene_bbox"], rtol=1e-4, atol=1e-5)
    assert [scene.near, scene.far] == golden[f"{key}/near_far"].tolist()
    assert [scene.width, scene.height] == golden[f"{key}/img_wh"].tolist()
    assert scene.white_background == bool(golden[f"{key}/white_bg"])
    assert scene.ndc == scene.random_background == (dataset == "llff")
    assert (scene.dataset, scene.split, scene.images.dtype) == (dataset, split, torch.uint8)
    assert len(scene.image_paths) == scene.n_images


@pytest.mark.parametrize("dataset", FORMATS)
def test_downsampling_scales_size_and_intrinsics_together(dataset):
    full = load(dataset, "train")
    half = load(dataset, "train", 2 * FORMATS[dataset][2])
    assert (half.width, half.height) == (full.width // 2, full.height // 2)
    scale = torch.tensor([half.width / full.width, half.height / full.height] * 2)
    torch.testing.assert_close(half.intrinsics, full.intrinsics * scale)
    torch.testing.assert_close(half.c2w, full.c2w)


def test_downsampling_by_a_fraction_rounds_the_size_down_and_filters_with_lanczos():
    scene = load("syn", "train", 1.5)
    assert (scene.width, scene.height) == (21, 21)
    with Image.open(scene.image_paths[0]) as image:
        expected = np.asarray(image.resize((21, 21), Image.Resampling.LANCZOS))
    assert np.array_equal(scene.images[0].numpy(), expected)


def test_scene_bbox_replaces_the_box_of_every_format():
    for dataset in FORMATS:
        scene = load(dataset, "test", scene_bbox=[-1, -2, -3, 1, 2, 3.5])
        assert scene.aabb.tolist() == [[-1, -2, -3], [1, 2, 3.5]]


def test_scene_names_lists_what_is_on_disk_and_scene_folder_finds_it(tmp_path, capsys):
    assert scene_names("syn", SCENES) == ["tiny"]
    assert scene_names("tt", SCENES) == ["Tiny"]
    assert scene_folder("llff", SCENES, "tiny") == SCENES / "nerf_llff_data" / "tiny"
    for name in ("b", "a", ".hidden"):
        (tmp_path / "nerf_synthetic" / name).mkdir(parents=True)
        (tmp_path / "nerf_synthetic" / name / "transforms_train.json").write_text("{}")
    (tmp_path / "nerf_synthetic" / "no_scene").mkdir()
    capsys.readouterr()
    assert scene_names("syn", tmp_path) == ["a", "b"]
    assert capsys.readouterr().out == "left out: nerf_synthetic/no_scene (no transforms_train.json)\n"


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_every_kind_of_image_file_becomes_8_bit_rgb_with_alpha_only_where_there_is_some(tmp_path):
    ramp = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
    rgb = np.stack([ramp, ramp[::-1], ramp], -1)
    rgba = np.concatenate([rgb, ramp[..., None]], -1)
    palette = Image.fromarray(rgb).convert("P")
    palette.save(tmp_path / "palette.png")
    cases = {
        save(tmp_path / "rgb.png", rgb): rgb,
        save(tmp_path / "rgba.png", rgba): rgba,
        save(tmp_path / "grey.png", ramp): np.stack([ramp] * 3, -1),
        save(tmp_path / "grey16.png", ramp.astype(np.uint16) * 257): np.stack([ramp] * 3, -1),
        tmp_path / "palette.png": np.asarray(palette.convert("RGB")),
        save(tmp_path / "grey_alpha.png", np.stack([ramp, ramp.T.reshape(3, 4)], -1)): np.stack(
            [ramp, ramp, ramp, ramp.T.reshape(3, 4)], -1
        ),
    }
    for path, expected in cases.items():
        info = probe_images([path], Problems())
        assert (info.width, info.height, info.channels) == (4, 3, expected.shape[-1]), path.name
        assert np.array_equal(decode_images([path], (4, 3), info.channels)[0].numpy(), expected), path.name


def test_transparent_colour_of_a_palette_becomes_alpha(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "keyed.png", transparency=0)
    info = probe_images([tmp_path / "keyed.png"], Problems())
    assert info.channels == 4
    pixels = decode_images([tmp_path / "keyed.png"], (2, 1), 4)
    assert pixels[0, 0, :, 3].tolist() == [0, 255]


def test_a_set_of_rgb_and_rgba_is_promoted_to_rgba(tmp_path):
    rgb = save(tmp_path / "a.png", np.full((2, 2, 3), 9, np.uint8))
    rgba = save(tmp_path / "b.png", np.full((2, 2, 4), 7, np.uint8))
    info = probe_images([rgb, rgba], Problems())
    images = decode_images([rgb, rgba], (2, 2), info.channels)
    assert images[0, 0, 0].tolist() == [9, 9, 9, 255]
    assert images[1, 0, 0].tolist() == [7, 7, 7, 7]


def test_orientation_tags_are_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "turned.jpg", np.zeros((4, 8, 3), np.uint8), exif=exif)
    info = probe_images([path], Problems())
    assert (info.width, info.height, info.channels) == (8, 4, 3)
    assert decode_images([path], (8, 4), 3).shape == (1, 4, 8, 3)


def copy_llff(tmp_path, folders):
    source, target = SCENES / "nerf_llff_data" / "tiny", tmp_path / "nerf_llff_data" / "tiny"
    for name, (width, height) in folders.items():
        (target / name).mkdir(parents=True)
        for file in (source / "images_4").iterdir():
            with Image.open(file) as image:
                image.resize((width, height)).save(target / name / file.name)
    (target / "poses_bounds.npy").write_bytes((source / "poses_bounds.npy").read_bytes())


@pytest.mark.parametrize(
    ("folders", "downsample", "used", "size"),
    [
        ({"images": (128, 96), "images_4": (32, 24), "images_8": (16, 12)}, 4, "images_4", (32, 24)),
        ({"images": (128, 96), "images_4": (32, 24), "images_8": (16, 12)}, 8, "images_8", (16, 12)),
        ({"images": (128, 96), "images_8": (16, 12)}, 4, "images", (32, 24)),
        ({"images_4": (32, 24)}, 8, "images_4", (16, 12)),
        ({"images": (128, 96), "images_4": (32, 24)}, 1, "images", (128, 96)),
    ],
)
def test_llff_takes_the_folder_that_needs_least_resizing(tmp_path, folders, downsample, used, size):
    copy_llff(tmp_path, folders)
    scene = load_scene("llff", tmp_path, "tiny", "train", downsample, progress=False)
    assert Path(scene.image_paths[0]).parent.name == used
    assert (scene.width, scene.height) == size
    torch.testing.assert_close(scene.intrinsics[:, 0], torch.full((8,), 110.0 * size[0] / 128))


def test_llff_never_enlarges_images_and_says_so(tmp_path):
    copy_llff(tmp_path, {"images_8": (16, 12)})
    with pytest.warns(UserWarning, match="images_8: images are only 16 px wide"):
        scene = load_scene("llff", tmp_path, "tiny", "test", 4, progress=False)
    assert (scene.width, scene.height) == (16, 12)
    torch.testing.assert_close(scene.intrinsics[0], torch.tensor([13.75, 13.75, 8.0, 6.0]))


@pytest.mark.skipif(not (SHARED / "nerf_synthetic" / "lego").is_dir(), reason="lego is not on this machine")
def test_lego_loads_with_its_known_camera():
    scene = load_scene("syn", SHARED, "lego", "test", 8, progress=False)
    assert scene.images.shape == (200, 100, 100, 4)
    torch.testing.assert_close(scene.intrinsics[0], torch.tensor([138.8889, 138.8889, 50.0, 50.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(scene.c2w[:, :, 3].norm(dim=-1), torch.full((200,), 4.0311), rtol=1e-4, atol=0)


@pytest.mark.skipif(not (SHARED / "nerf_llff_data" / "fern").is_dir(), reason="fern is not on this machine")
def test_fern_loads_with_every_8th_view_for_testing():
    scene = load_scene("llff", SHARED, "fern", "test", 16, progress=False)
    assert scene.images.shape == (3, 189, 252, 3)
    assert [Path(path).name for path in scene.image_paths] == ["image000.png", "image008.png", "image016.png"]
    torch.testing.assert_close(scene.intrinsics[0, 0], torch.tensor(3260.52633 / 16))
