"""Transforms and random erasing: sizes, values, statistics."""

import numpy as np
import pytest
import torch
from conftest import save_image
from PIL import Image
from torchvision.transforms import v2

import synthetic_market
from model import IMAGENET
from random_erasing import RandomErasing
from reid import transforms
from reid.errors import UserError

FILL = (0.4914, 0.4822, 0.4465)


def pil(pixels):
    return Image.fromarray(np.asarray(pixels, np.uint8))


def plain(path, choices, height, width):
    """The per-image chain, step by step through Pillow: float32 [3, height, width]."""
    top, left, flip = (int(choices[n]) for n in range(3))
    image = Image.open(path).convert("RGB")
    image = image.resize((width * 9 // 8, height * 9 // 8), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + width, top + height))
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    pixels = np.asarray(image) / 255
    pixels = (pixels - IMAGENET[0]) / IMAGENET[1]
    top, left, tall, wide = choices.erased[0].tolist()
    pixels[top : top + tall, left : left + wide] = FILL
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Pictures like those that are trained on, and some of noise, of two sizes."""
    folder = tmp_path_factory.mktemp("rendered")
    scale = synthetic_market.Scale(
        train_ids=4,
        train_images=24,
        test_ids=2,
        queries=6,
        gallery_images=12,
        distractors=1,
        junk=1,
    )
    synthetic_market.render(folder, scale, seed=0, workers=0)
    paths = sorted((folder / "bounding_box_train").iterdir())
    paths += [save_image(folder / f"noise{n}.png", seed=n) for n in range(4)]
    sizes = [(150, 400), (50, 128), (100, 150), (40, 300), (144, 288), (200, 90)]
    return paths + [save_image(folder / f"{s}.png", seed=9, size=s) for s in sizes]


def test_a_batch_is_what_the_plain_chain_makes_of_each_image(rendered):
    transform = transforms.TrainTransform(256, 128, IMAGENET, erasing_p=0.8)
    choices = transform.draw(len(rendered), torch.Generator().manual_seed(0))
    images = [transform.read(path) for path in rendered]
    found = transform.finish(transform.crop(images, choices), choices)
    assert found.shape == (len(rendered), 3, 256, 128)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    for number, path in enumerate(rendered):
        expected = plain(path, choices.part(slice(number, number + 1)), 256, 128)
        assert (found[number] - expected).abs().max() < 1e-5, path.name


def test_choices_cover_what_may_be_drawn():
    """Every crop equally often, half of the images flipped, crops independent of flips."""
    number = 40_000
    choices = transforms.TrainTransform(64, 32, IMAGENET, 0.5).draw(
        number, torch.Generator().manual_seed(0)
    )
    for drawn, positions in [(choices.top, 9), (choices.left, 5)]:
        rates = torch.bincount(drawn, minlength=positions) / number
        assert len(rates) == positions
        assert (rates - 1 / positions).abs().max() < 0.01
    assert choices.flip.float().mean() == pytest.approx(0.5, abs=0.01)
    assert (choices.erased[:, 2] > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    together = torch.stack([choices.top, choices.left, choices.flip]).float()
    assert torch.corrcoef(together).triu(1).abs().max() < 0.02


def test_moments_are_those_of_the_plain_chain(rendered):
    """Mean and deviation of each channel over many draws, against torchvision's own transforms."""
    torch.manual_seed(0)
    chain = v2.Compose(
        [
            v2.Resize((288, 144), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomCrop((256, 128)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*IMAGENET),
            RandomErasing(0.8),
        ]
    )
    pictures = rendered[:12]
    expected = torch.stack([chain(Image.open(path)) for path in pictures for _ in range(25)])
    transform = transforms.TrainTransform(256, 128, IMAGENET, erasing_p=0.8)
    images = [transform.read(path) for path in pictures for _ in range(25)]
    choices = transform.draw(len(images), torch.Generator().manual_seed(1))
    found = transform.finish(transform.crop(images, choices), choices)
    for moment in (torch.mean, torch.std):
        ours, theirs = (moment(x, dim=(0, 2, 3)) for x in (found, expected))
        assert (ours - theirs).abs().max() < 0.03


def test_test_images_are_resized_by_pillow():
    image = pil(np.random.default_rng(0).integers(0, 256, (128, 64, 3)))
    resized = np.asarray(image.resize((144, 288), Image.Resampling.BICUBIC))
    found = transforms.normalise(torch.from_numpy(resized.copy())[None], *IMAGENET)[0]
    found = found.permute(1, 2, 0).numpy() * IMAGENET[1] + IMAGENET[0]
    np.testing.assert_allclose(found, resized / 255, atol=1e-6)


def test_sizes_of_testing_and_validation(rendered):
    assert transforms.EvalTransform((256, 128)).read(rendered[0]).shape == (256, 128, 3)
    kinds = {"enlarged": "288x144", "center": "256x128 of 288x144", "same": "256x128"}
    kinds |= {"96x40": "96x40", "96x40 of 100x50": "96x40 of 100x50"}
    for kind, text in kinds.items():
        transform = transforms.transform_for_testing(kind, 256, 128)
        assert str(transform) == text
        assert transform.read(rendered[0]).shape == (*transform.size, 3)


def test_center_is_the_middle_of_the_enlarged_image():
    """Also at other scales, and as torchvision's CenterCrop cuts it."""
    image = pil(np.random.default_rng(0).integers(0, 256, (128, 64, 3)))
    center = transforms.transform_for_testing("center", 64, 32)
    for transform, size, full in (
        (center, (64, 32), (72, 36)),
        (center.scaled(1.5), (96, 48), (108, 54)),
        (transforms.EvalTransform((60, 33), (71, 38)), (60, 33), (71, 38)),
    ):
        found = transform.resize(image)
        resized = image.resize(full[::-1], Image.Resampling.BICUBIC)
        expected = np.asarray(v2.CenterCrop(size)(resized))
        np.testing.assert_array_equal(found, expected)
        assert (transform.size, transform.full) == (size, full)
    with pytest.raises(UserError, match=r"--ms 0\.9: makes images of 58x29"):
        center.scaled(0.9)


@pytest.mark.parametrize("flags", [{"color_jitter": True}, {"auto_augment": True}])
def test_colours_differ_by_image_and_follow_their_seeds(flags, rendered):
    transform = transforms.TrainTransform(64, 32, IMAGENET, 0, **flags)
    image = torch.from_numpy(transforms.EvalTransform((64, 32)).read(rendered[0]))
    choices = transform.draw(6, torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    found = transform.finish(torch.stack([image] * 6), choices)
    again = transform.finish(torch.stack([image] * 2), choices.part(slice(2, 4)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found[2:4], again)
    assert len({tuple(x.flatten().tolist()) for x in found}) >= 5


def test_erasing_is_off_at_zero_and_leaves_its_input_alone():
    images = torch.randn(8, 3, 32, 16)
    before = images.clone()
    assert torch.equal(RandomErasing(0.0)(images), images)
    assert not torch.equal(RandomErasing(1.0)(images), images)
    assert torch.equal(images, before)


def test_one_image_gets_one_filled_rectangle():
    torch.manual_seed(0)
    for _ in range(50):
        erased = RandomErasing(1.0)(torch.full((3, 64, 32), 9.0))
        mask = erased[0] != 9
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask.sum() == len(rows) * len(columns) > 0  # full rows x full columns
        assert rows[-1] - rows[0] + 1 == len(rows)  # without gaps
        assert columns[-1] - columns[0] + 1 == len(columns)
        for channel, fill in enumerate(FILL):
            assert torch.allclose(erased[channel][mask], torch.tensor(fill))


def test_masks_for_gpus_cover_what_the_cpu_fills():
    erasing = RandomErasing(0.8)
    rectangles = erasing.rectangles(50, 64, 32, torch.Generator().manual_seed(0))
    filled = erasing.erase(torch.full((50, 3, 64, 32), 9.0), rectangles)
    assert torch.equal(erasing.masks(rectangles, 64, 32), filled[:, 0] != 9)


def test_erasing_statistics():
    """Probability, area and aspect of the rectangles, and that they lie anywhere."""
    torch.manual_seed(0)
    height, width, number = 256, 128, 20_000
    top, left, tall, wide = RandomErasing(0.8).rectangles(number, height, width).unbind(1)
    erased = tall > 0
    assert erased.float().mean() == pytest.approx(0.8, abs=0.01)
    tall, wide, top, left = (x[erased].float() for x in (tall, wide, top, left))
    area, aspect = tall * wide / (height * width), tall / wide
    assert 0.018 < area.min() < 0.03
    assert 0.38 < area.max() < 0.42
    assert aspect.min() > 0.28
    assert aspect.max() < 3.5
    assert (tall < height).all()
    assert (wide < width).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    assert (top == 0).any()
    assert (top + tall == height).any()
    assert (left == 0).any()
    assert (left + wide == width).any()
    # Drawn naively, one at a time, for comparison: uniform area and aspect, redrawn until it fits.
    rng = np.random.default_rng(0)
    naive = []
    while len(naive) < 5_000:
        fraction, ratio = rng.uniform(0.02, 0.4), rng.uniform(0.3, 1 / 0.3)
        h = round(np.sqrt(fraction * height * width * ratio))
        w = round(np.sqrt(fraction * height * width / ratio))
        if h < height and w < width:
            naive.append(h * w / (height * width))
    assert area.mean() == pytest.approx(np.mean(naive), abs=0.004)
