"""The same training step in PyTorch: `KERAS_BACKEND=torch python main.py ...`."""

import augment
import torch
from keras import ops
from torch.nn.functional import softplus
from utils import to_signed


def make_step(gan):
    """A function of a batch that updates both networks of `gan`; see DCGAN.train_step."""
    generator, discriminator = gan.generator, gan.discriminator

    def seen(images, plan):
        return discriminator(augment.apply(images, plan), training=True)

    def update(optimizer, network, loss):
        weights = network.trainable_variables
        gradients = torch.autograd.grad(loss, [weight.value for weight in weights])
        with torch.no_grad():
            optimizer.apply(gradients, weights)

    def step(real, z, plans, share):
        real, z = ops.convert_to_tensor(real), ops.convert_to_tensor(z)
        real = to_signed(real.float())
        fake = generator(z, training=True)
        # Two calls, not one of both: batch norm keeps the statistics of real and fake apart.
        on_real, on_fake = seen(real, plans[0]), seen(fake.detach(), plans[1])
        d_loss = softplus(-on_real).mean() + softplus(on_fake).mean()
        update(gan.d_optimizer, discriminator, d_loss)
        # The same images serve the first generator step: its weights have not changed since.
        update(gan.g_optimizer, generator, softplus(-seen(fake, plans[2])).mean())
        g_loss = softplus(-seen(generator(z, training=True), plans[3])).mean()
        update(gan.g_optimizer, generator, g_loss)
        with torch.no_grad():
            gan.update_average(float(share))
        return d_loss.detach(), g_loss.detach()

    return step


def make_forward(generator):
    """A function z -> images, batch norm with its moving averages."""
    return torch.inference_mode()(lambda z: generator(z, training=False))
