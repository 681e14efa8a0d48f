"""How to test a network, found on people held out of its training: the layer and the image size.

Which layer's features find new people best, and at which size, differs from backbone to backbone
and from recipe to recipe. Images of people that were trained on can't tell.
"""

import copy
from argparse import Namespace
from itertools import product

import numpy as np
import torch
from torch import nn

from model import LAYERS
from reid.dataset import EvalImage
from reid.distributed import World
from reid.errors import UserError
from reid.features import extract
from reid.metrics import FeatureSet, evaluate, similarity_blocks
from reid.transforms import transform_for_testing


def queries_and_gallery(people: list[EvalImage]) -> tuple[list[EvalImage], list[EvalImage]]:
    """Split images of people: the first of each person in each camera is a query, the rest gallery.

    Raises UserError where no query has an image of its person by another camera.
    """
    queries = {}
    for image in people:
        queries.setdefault((image.identity, image.camera), image)
    paths = {image.path for image in queries.values()}
    gallery = [image for image in people if image.path not in paths]
    cameras = {}
    for image in gallery:
        cameras.setdefault(image.identity, set()).add(image.camera)
    if not any(cameras.get(q.identity, set()) - {q.camera} for q in queries.values()):
        raise UserError(
            "--val_ids: nobody who is held out was seen by two cameras, and twice by one of them; "
            "hold out more"
        )
    return list(queries.values()), gallery


def choose_testing(
    net: nn.Module,
    people: list[EvalImage],
    args: Namespace,
    world: World,
    dtype: torch.dtype | None,
) -> dict | None:
    """Return the layer and the size with the best mAP on `people`, and all scores: a dict.

    args: options of a training script; its test_size, where given, is the only one tried.
    Prints a table. All processes of `world` must call it; the first gets the dict.
    """
    parts = queries_and_gallery(people)
    kinds = [args.test_size] if args.test_size else ["same", "center", "enlarged"]
    scores = []
    for kind, layer in product(kinds, LAYERS):
        transform = transform_for_testing(kind, args.height, args.width)
        resized = copy.deepcopy(net)
        try:
            resized.set_size(*transform.size)
        except ValueError:  # not every backbone takes the larger one
            continue
        sets = []
        for part, images in zip(("query", "gallery"), parts, strict=True):
            features = extract(
                resized,
                [image.path for image in images],
                [transform],
                world,
                dtype=dtype,
                batchsize=args.batchsize,
                workers=args.workers,
                label=f"held out, {part}, {layer} at {transform}",
                layer=layer,
            )
            if world.first:
                labels = ([getattr(i, name) for i in images] for name in ("identity", "camera"))
                sets.append(FeatureSet(features, *map(np.array, labels)))
        if world.first:
            found = evaluate(similarity_blocks(*sets), *sets)
            score = {"rank1": found.rank(1), "mAP": found.mean_ap()}
            scores.append({"layer": layer, "test_size": kind, **score})
    return summed_up(scores, people, parts) if world.first else None


def summed_up(scores, people, parts):
    """Print the scores, and return them with the choice."""
    best = max(scores, key=lambda score: score["mAP"])
    identities = len({image.identity for image in people})
    print(f"on {identities} people held out ({len(parts[0])} queries, {len(parts[1])} gallery):")
    for score in scores:
        chosen = ", taken for testing" if score is best else ""
        print(
            f"  {score['layer']:10} {score['test_size']:8} Rank@1 {100 * score['rank1']:.2f}, mAP "
            f"{100 * score['mAP']:.2f}{chosen}"
        )
    choice = {"layer": best["layer"], "test_size": best["test_size"]}
    return {**choice, "people": identities, "scores": scores}
