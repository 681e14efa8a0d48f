"""Twenty or fewer steps of training in float64, alone or under torchrun; writes gradients, weights.

    python tests/twenty_steps.py PREPARED OUT.pth STEPS [flags of train_lsro.py]

Called by test_distributed.py. In float64, since rounding grows from step to step.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_lsro
from model import ft_net_dense
from reid import losses
from reid.checkpoint import unwrap
from reid.dataset import generated_images, labelled_images
from reid.distributed import join_world
from reid.engine import Training
from reid.options import parse_training

prepared, out, last, *flags = sys.argv[1:]
prepared, last = Path(prepared), int(last)
args = parse_training(train_lsro.get_parser(), flags)
world = join_world(args.gpu_ids)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = ft_net_dense(3, neck=args.neck)
torch.set_default_dtype(torch.float32)
training = Training(args, world, net, None, losses.label_rule(args.gan_label))
training.read(
    labelled_images(prepared / "train_new") + generated_images(prepared / "train_new" / "gen_0000"),
    labelled_images(prepared / "val_new"),
)
result, steps = {}, 0
while steps < last:
    torch.manual_seed(steps)
    training.net.train()
    for batch in training.batches.epoch(steps):
        training.step(batch._replace(images=batch.images.double()))
        named = unwrap(training.net).named_parameters()
        if steps == 0:
            result["gradients"] = {n: p.grad.clone() for n, p in named if p.requires_grad}
        steps += 1
result["weights"] = unwrap(training.net).state_dict()
if world.first:
    torch.save(result, out)
