"""The networks: sizes, initial weights, averaged weights, sampling."""

import keras
import main
import numpy as np
import pytest
from keras import ops
from utils import to_uint8

from model import DCGAN, build_discriminator, build_generator

TINY = {"z_dim": 6, "gf_dim": 4, "df_dim": 4}


def norm_parameters(*channels):
    return 4 * sum(channels)  # scale, shift, moving mean and variance


KERNELS = 25 * (512 * 256 + 256 * 128 + 128 * 64)  # which both networks have


def test_generator_of_full_width_is_that_of_the_papers():
    net = build_generator(128, 64)
    sizes = [layer.output.shape[1:] for layer in net.layers if "transpose" in layer.name]
    assert sizes == [(16, 8, 256), (32, 16, 128), (64, 32, 64), (128, 64, 3)]
    first, last = 101 * 8 * 4 * 512, 25 * 64 * 3 + 3
    assert net.count_params() == first + KERNELS + last + norm_parameters(512, 256, 128, 64)
    norm = next(layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization))
    assert (norm.momentum, norm.epsilon) == (0.9, 1e-5)
    assert np.std(ops.convert_to_numpy(net.layers[0].kernel)) == pytest.approx(0.02, abs=1e-3)


def test_discriminator_of_full_width_is_that_of_the_papers():
    net = build_discriminator(128, 64)
    sizes = [layer.output.shape[1:] for layer in net.layers if layer.name.startswith("conv2d")]
    assert sizes == [(64, 32, 64), (32, 16, 128), (16, 8, 256), (8, 4, 512)]
    first, last = (25 * 3 + 1) * 64, 8 * 4 * 512 + 1
    assert net.count_params() == first + KERNELS + last + norm_parameters(128, 256, 512)


def test_slope_and_adam_are_the_papers():
    layers = build_discriminator(32, 16, 4).layers
    leaky = [layer for layer in layers if isinstance(layer, keras.layers.LeakyReLU)]
    assert [layer.negative_slope for layer in leaky] == [0.2] * 4
    assert (main.TRAINING["learning_rate"], main.TRAINING["beta1"]) == (2e-4, 0.5)
    gan = DCGAN(32, 16, **TINY)
    for adam in (gan.d_optimizer, gan.g_optimizer):
        assert float(adam.learning_rate) == pytest.approx(2e-4)
        assert adam.beta_1 == 0.5


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    gan = DCGAN(32, 16, **TINY, ema=0.9)
    # Other moving averages than those of a batch, as after a training.
    for layer in gan.average.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(layer.moving_mean + 0.1)
    z = gan.noise(64, 0)
    alone = gan.generate(np.concatenate([z[:1], np.ones((63, 6), "f")]))[0]
    np.testing.assert_array_equal(gan.generate(z)[0], alone)
    by_batch = to_uint8(ops.convert_to_numpy(gan.average(z, training=True)))
    assert not np.array_equal(by_batch[0], alone)


def test_averaged_weights_follow_with_a_decay_that_rises():
    gan = DCGAN(32, 16, **TINY, ema=0.15)
    real = np.zeros((4, 32, 16, 3), np.uint8)
    # All weights, the moving averages of batch norm among them.
    means = [ops.convert_to_numpy(weight) for weight in gan.average.weights]
    for decay in (1 / 10, 0.15, 0.15):  # of steps 0, 1 (2 / 11 would be above 0.15) and 2
        gan.train_step(real)
        newest = [ops.convert_to_numpy(weight) for weight in gan.generator.weights]
        means = [decay * mean + (1 - decay) * new for mean, new in zip(means, newest, strict=True)]
    for mean, weight in zip(means, gan.average.weights, strict=True):
        np.testing.assert_allclose(mean, ops.convert_to_numpy(weight), atol=1e-6)
    gaps = [abs(mean - new).max() for mean, new in zip(means, newest, strict=True)]
    assert max(gaps) > 1e-4
