"""One training step in TensorFlow: a single graph, in which nothing is computed twice."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import augment
import keras
import tensorflow as tf
from utils import to_signed

if TYPE_CHECKING:
    from model import DCGAN

# softplus(-x) = -log sigmoid(x), softplus(x) = -log(1 - sigmoid(x))
softplus = tf.nn.softplus


def make_step(gan: "DCGAN") -> Callable:
    """Return a function that updates both networks of `gan` by one batch; see DCGAN.train_step."""
    generator, discriminator = gan.generator, gan.discriminator

    def discriminate(images, augmentation):
        return discriminator(augment.apply(images, augmentation), training=True)

    def update_discriminator(real, fake, augmentations):
        with tf.GradientTape() as tape:
            # Two calls, not one of both together: real and fake images would share their batch
            # norm statistics.
            on_real = discriminate(real, augmentations[0])
            on_fake = discriminate(fake, augmentations[1])
            loss = tf.reduce_mean(softplus(-on_real)) + tf.reduce_mean(softplus(on_fake))
        weights = discriminator.trainable_variables
        gan.d_optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    def update_generator(tape, loss):
        weights = generator.trainable_variables
        gan.g_optimizer.apply(tape.gradient(loss, weights), weights)

    @tf.function(jit_compile=gan.xla)
    def step(real, z, augmentations, step_size):
        real = to_signed(tf.cast(real, tf.float32))
        with tf.GradientTape() as tape:
            fake = generator(z, training=True)
            with tape.stop_recording():
                d_loss = update_discriminator(real, fake, augmentations)
            # The generator hasn't changed since, so the same images serve its first step.
            g_loss = tf.reduce_mean(softplus(-discriminate(fake, augmentations[2])))
        update_generator(tape, g_loss)
        with tf.GradientTape() as tape:
            fake = generator(z, training=True)
            g_loss = tf.reduce_mean(softplus(-discriminate(fake, augmentations[3])))
        update_generator(tape, g_loss)
        gan.update_average(step_size)
        return d_loss, g_loss

    return step


def make_forward(generator: keras.Model) -> Callable:
    """Return a function z -> images, in which batch norm uses its moving averages."""
    return tf.function(lambda z: generator(z, training=False), reduce_retracing=True)
