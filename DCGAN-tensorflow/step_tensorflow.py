"""One training step in TensorFlow: a single graph, in which nothing is computed twice."""

import augment
import tensorflow as tf
from utils import to_signed

# softplus(-x) = -log sigmoid(x), softplus(x) = -log(1 - sigmoid(x))
softplus = tf.nn.softplus


def make_step(gan):
    """A function of a batch that updates both networks of `gan`; see DCGAN.train_step."""
    generator, discriminator = gan.generator, gan.discriminator

    def seen(images, plan):
        return discriminator(augment.apply(images, plan), training=True)

    def update_discriminator(real, fake, plans):
        with tf.GradientTape() as tape:
            # Two calls, not one of both: batch norm keeps the statistics of real and fake apart.
            on_real, on_fake = seen(real, plans[0]), seen(fake, plans[1])
            loss = tf.reduce_mean(softplus(-on_real)) + tf.reduce_mean(softplus(on_fake))
        weights = discriminator.trainable_variables
        gan.d_optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    def update_generator(tape, loss):
        weights = generator.trainable_variables
        gan.g_optimizer.apply(tape.gradient(loss, weights), weights)

    @tf.function(jit_compile=gan.xla)
    def step(real, z, plans, share):
        real = to_signed(tf.cast(real, tf.float32))
        with tf.GradientTape() as tape:
            fake = generator(z, training=True)
            with tape.stop_recording():
                d_loss = update_discriminator(real, fake, plans)
            # The same images serve the first generator step: its weights have not changed since.
            g_loss = tf.reduce_mean(softplus(-seen(fake, plans[2])))
        update_generator(tape, g_loss)
        with tf.GradientTape() as tape:
            g_loss = tf.reduce_mean(softplus(-seen(generator(z, training=True), plans[3])))
        update_generator(tape, g_loss)
        gan.update_average(share)
        return d_loss, g_loss

    return step


def make_forward(generator):
    """A function z -> images, batch norm with its moving averages."""
    return tf.function(lambda z: generator(z, training=False), reduce_retracing=True)
