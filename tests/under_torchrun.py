"""What test_distributed.py computes in its own process and, on two, in one start of torchrun.

python tests/under_torchrun.py '[["train_steps", "OUT.pth", "PREPARED", STEPS, FLAG, ...], ...]'
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_lsro
from reid import losses
from reid.checkpoint import unwrap
from reid.dataset import generated_images, labelled_images
from reid.distributed import join_world, leave_world
from reid.gan_labels import Teacher
from reid.learner import Learner
from reid.options import parse_training
from reid.weights import build_network


def train_steps(out, prepared, last, *flags):
    """Train some steps and write gradients, losses and weights, and what validation finds.

    In float64, since rounding grows from step to step.
    """
    args = parse_training(train_lsro.get_parser(), flags)
    world = join_world(args.gpu_ids)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        net = build_network(args.backbone, 3, "none", (args.height, args.width), neck=args.neck)
    finally:
        torch.set_default_dtype(torch.float32)
    training = Learner(args, world, net, None, losses.label_rule(args.gan_label))
    real, generated = images(prepared)
    if args.balance:
        real = [sample._replace(dataset=sample.label % 2) for sample in real]
    training.read(real + generated, labelled_images(Path(prepared) / "val_new"))
    result, steps = {"losses": []}, 0
    while steps < last:
        torch.manual_seed(steps)
        training.net.train()
        for batch in training.batches.epoch(steps):
            views = None if batch.views is None else batch.views.double()
            loss, _ = training.step(batch._replace(images=batch.images.double(), views=views))
            result["losses"].append(loss.item())
            named = unwrap(training.net).named_parameters()
            if steps == 0:
                result["gradients"] = {n: p.grad.clone() for n, p in named if p.requires_grad}
            steps += 1
    result["weights"] = unwrap(training.net).state_dict()
    training.averaged().float()  # as the images to validate on are
    result["validation"] = training.validate()
    if world.first:
        torch.save(result, out)


def make_tables(out, prepared, *flags):
    """Write the tables of the label rules of a finished run, each process its own."""
    args = train_lsro.parse(flags)
    world = join_world(args.gpu_ids)
    real, generated = images(prepared)
    teacher = Teacher(args, real, world)
    rules = ("mprl_static", "sls", "teacher")
    tables = [teacher.targets(rule, real, generated) for rule in rules]
    torch.save(tables, f"{out}.{world.rank}")


def images(prepared):
    """Return real and generated training images."""
    folder = Path(prepared) / "train_new"
    return labelled_images(folder), generated_images(folder / "gen_0000")


if __name__ == "__main__":
    for name, *words in json.loads(sys.argv[1]):
        globals()[name](*words)
    leave_world()
