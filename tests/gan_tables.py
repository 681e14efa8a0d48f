"""The tables of the label rules mprl_static and sls, made alone or under torchrun.

    python tests/gan_tables.py PREPARED OUT.pth [flags of train_lsro.py]

Called by test_distributed.py.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_lsro
from reid.dataset import generated_images, labelled_images
from reid.distributed import join_world, leave_world
from reid.gan_labels import Teacher

prepared, out, *flags = sys.argv[1:]
args = train_lsro.parse(flags)
world = join_world(args.gpu_ids)
real = labelled_images(Path(prepared) / "train_new")
generated = generated_images(Path(prepared) / "train_new" / "gen_0000")
teacher = Teacher(args, real, world)
tables = [teacher.rank_table(generated), teacher.cluster_table(real, generated)]
torch.save(tables, f"{out}.{world.rank}")
leave_world()
