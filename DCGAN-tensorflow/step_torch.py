"""One training step in PyTorch, the same as in step_tensorflow.py."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import augment
import keras
import torch
from keras import ops
from torch.nn.functional import softplus
from utils import to_signed

if TYPE_CHECKING:
    from model import DCGAN


def make_step(gan: "DCGAN") -> Callable:
    """Return a function that updates both networks of `gan` by one batch; see DCGAN.train_step."""
    generator, discriminator = gan.generator, gan.discriminator

    def discriminate(images, augmentation):
        return discriminator(augment.apply(images, augmentation), training=True)

    def update(optimizer, network, loss):
        weights = network.trainable_variables
        gradients = torch.autograd.grad(loss, [weight.value for weight in weights])
        with torch.no_grad():
            optimizer.apply(gradients, weights)

    def step(real, z, augmentations, step_size):
        real, z = ops.convert_to_tensor(real), ops.convert_to_tensor(z)
        real = to_signed(real.float())
        fake = generator(z, training=True)
        # Two calls, not one of both together: real and fake images would share their batch
        # norm statistics.
        on_real = discriminate(real, augmentations[0])
        on_fake = discriminate(fake.detach(), augmentations[1])
        d_loss = softplus(-on_real).mean() + softplus(on_fake).mean()
        update(gan.d_optimizer, discriminator, d_loss)
        # The generator hasn't changed since, so the same images serve its first step.
        g_loss = softplus(-discriminate(fake, augmentations[2])).mean()
        update(gan.g_optimizer, generator, g_loss)
        fake = generator(z, training=True)
        g_loss = softplus(-discriminate(fake, augmentations[3])).mean()
        update(gan.g_optimizer, generator, g_loss)
        with torch.no_grad():
            gan.update_average(float(step_size))
        return d_loss.detach(), g_loss.detach()

    return step


def make_forward(generator: keras.Model) -> Callable:
    """Return a function z -> images, in which batch norm uses its moving averages."""
    return torch.inference_mode()(lambda z: generator(z, training=False))
