"""Networks from weights files of this and of other codes.

Other codes name the same tensors otherwise: `base.conv1.weight`, `module.encoder_q.conv1.weight`,
`module.base.0.weight`, `backbone.conv1.weight`. A backbone is found where a file has all of its
tensors, with their shapes, under their names and one prefix; else where layers of other names
follow one another as the backbone's do, all of them. No tensor is taken for another one because it
alone would fit, and a file with more blocks than the backbone is another's.
"""

import argparse
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import CLASSIC, ReIDNet, fixed_size, make_network, options_of
from reid.errors import UserError, explanation, first_line, is_first, missing_package
from reid.options import HEIGHT, NETWORKS, WIDTH

AGAIN = "copy it again, or name another"  # advice on a damaged file
WRAPPERS = ("state_dict", "model")  # the keys that weights lie under, beside epoch and optimiser
# Batch norm's counters, which nothing here reads. Files older than PyTorch 0.4.1 lack them.
COUNTER = "num_batches_tracked"
# Of two copies of a network in one file the one to take: the other is for training only (MoCo,
# MoCo v3, DINO).
PREFERRED = ("encoder_q", "base_encoder", "teacher")
FACTS = ("_extra_state", "stride_1")  # in our own files, no weights
NAMED = 8  # number of layers left out that are named
NORM = ("weight", "bias", "running_mean", "running_var")
# Numbers and options that other codes keep beside their weights, and that can do nothing.
SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)),
    (SCALAR, "numpy.core.multiarray.scalar"),
    (SCALAR, "numpy._core.multiarray.scalar"),
]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors in a weights file (.pth, .pt, .safetensors), on the CPU, by name.

    Names have no `module.` prefix; a state_dict may lie under "state_dict" or "model", and any
    other dict in the file gives its tensors its name and a dot. Nothing but tensors and plain
    values is loaded. Raises UserError for a file that is missing, damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file; check the path")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    for name in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    weights = dict(flat(content))
    if not weights:
        raise UserError(f"{path}: holds no plain state_dict; name a file of weights")
    return {plain_name(name): value for name, value in weights.items()}


def plain_name(name):
    """Return a tensor's name without DataParallel's prefix, and as DenseNet's modules are called.

    Files of torchvision's DenseNet say "norm.1", its modules are called "norm1".
    """
    name = re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)
    return name.removeprefix("module.")


def read_torch(path):
    """Read a file that torch.save wrote, if it holds tensors and plain values only."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        needs_more = isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error).upper()
        if needs_more or is_script(path):
            raise UserError(
                f"{path}: holds Python objects beside its weights, which could run any code; if "
                "you trust its origin, keep the weights alone: in Python torch.save(torch.load("
                f"{str(path)!r}, weights_only=False)['state_dict'], 'weights.pth'), or under what "
                "key they lie, or the .state_dict() of a whole network"
            ) from error
        if explanation(error):  # full memory, a file that may not be read: no damage
            raise
        raise UserError(f"{path}: not a readable PyTorch weights file; {AGAIN}") from error


def is_script(path):
    """Tell whether a file is a TorchScript archive, which holds code."""
    with suppress(zipfile.BadZipFile, OSError), zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())
    return False


def read_safetensors(path):
    """Read a .safetensors file."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise missing_package(f"{path}", "safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        if explanation(error):
            raise
        raise UserError(f"{path}: not a readable safetensors file; {AGAIN}") from error


def flat(content: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, with their keys joined by dots."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if torch.is_tensor(value):
            yield f"{prefix}{key}", value
        else:
            yield from flat(value, f"{prefix}{key}.")


# --- networks -----------------------------------------------------------------------------------


def build_network(
    backbone: str,
    class_num: int,
    pretrained: str = "none",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **options,
) -> ReIDNet:
    """Build a network with a backbone from ImageNet ("imagenet"), a file, or random ("none").

    size: height and width of its images in pixels. options: neck, pooling, last_stride.
    Raises UserError where it can't be made, or the weights can't be had.
    """
    if pretrained == "imagenet":
        check_network(backbone, **options)  # before a download
        try:
            with without_logging():  # of each time that a download is tried again
                net = make_network(backbone, class_num, pretrained, **options)
        except Exception as error:  # no network, a proxy, a broken download: many kinds
            raise UserError(
                f"--pretrained imagenet: the weights of {backbone} can't be had "
                f"({first_line(error)}); pass --pretrained FILE with a copy of them, or "
                "--pretrained none"
            ) from error
    else:
        with as_user_errors(backbone):
            net = make_network(backbone, class_num, **options)
    if pretrained in ("none", "imagenet"):
        with as_user_errors(backbone):
            net.set_size(*size)
    else:
        try:
            weights = read_weights(pretrained)
        except UserError as error:
            raise UserError(f"--pretrained {error}") from error
        left_out = fill_backbone(net, weights, pretrained, size)
        if left_out and is_first():
            print(f"{pretrained}: left out {summary(left_out)}")
    return net


def check_network(backbone: str, **options) -> None:
    """Raise UserError where `build_network` can't make a network, without random weights."""
    with (
        torch.device("meta"),
        as_user_errors(backbone),
        suppress(NotImplementedError, RuntimeError),
    ):
        make_network(backbone, 1, **options)  # a few of timm's need numbers to be made


@contextmanager
def without_logging(level: int = logging.ERROR) -> Iterator[None]:
    """Keep other packages' loggers quiet inside, up to a level."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def as_user_errors(backbone: str) -> Iterator[None]:
    """Raise as UserErrors what the making of a network, or of one for a size, raises inside."""
    try:
        yield
    except ImportError as error:
        raise missing_package(f"--backbone {backbone}", "timm") from error
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith("--") else f"--backbone {text}") from error


def load_network(path: str | Path, backbone: str | None = None) -> ReIDNet:
    """Load the network in a `net_*.pth`, whatever its class count, with or without `module.`.

    backbone: the one that the caller expects; None takes what the file holds.
    Raises UserError for a damaged file, and for another network than expected.
    """
    weights = read_weights(path)
    try:
        options = options_of(weights)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the weights of a network of this code; those of others go with --weights"
        ) from error
    if backbone not in (None, options["backbone"]):
        holds, expected = (NETWORKS.get(n, n) for n in (options["backbone"], backbone))
        raise UserError(f"{path}: holds a {holds}, not the expected {expected}")
    try:
        # The two classic ones need not draw random weights first; timm's have parts that are no
        # weights and would stay empty.
        device = torch.device("meta" if options["backbone"] in CLASSIC else "cpu")
        with device, as_user_errors(options["backbone"]):
            net = make_network(**options)
            if size := fixed_size(weights):
                net.set_size(*size)
        net.load_state_dict(weights, assign=True)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path}: not the weights of a {options['backbone']} network; {AGAIN}"
        ) from error
    return net.float()


# --- a backbone in a file -----------------------------------------------------------------------


def fill_backbone(
    net: ReIDNet, weights: dict[str, Tensor], path: str | Path, size: tuple[int, int]
) -> list[str]:
    """Fill the backbone of `net` from another network's weights; its head keeps its start values.

    size: height and width of the images to come. Position codes may be those of the size that the
    backbone was published for, or of this one. Leaves `net` ready for images of this size.
    Returns the names of the tensors that were left out. Raises UserError that names `path` where
    the backbone is not in there, whole and once.
    """
    try:
        names = find_backbone(weights, backbone_tensors(net))
    except ValueError as problem:
        refusal = UserError(
            f"{path}: not the weights of a {net.backbone} backbone ({problem}); name the right one "
            "with --backbone"
        )
        if net.any_size:
            raise refusal from None
        with as_user_errors(net.backbone):
            net.set_size(*size)
        try:
            names = find_backbone(weights, backbone_tensors(net))
        except ValueError:
            raise refusal from None
    found = {name: weights[theirs] for name, theirs in names.items()}
    net.model.load_state_dict(found, strict=False)
    with as_user_errors(net.backbone):
        net.set_size(*size)
    known = {*names.values(), *FACTS}
    return [name for name in weights if name not in known and not name.endswith(COUNTER)]


def backbone_tensors(net: ReIDNet) -> dict[str, Tensor]:
    """Return the backbone's part of a network's state_dict, without counters.

    Not DenseNet's own ImageNet classifier either, which is never used.
    """
    return {
        name: value
        for name, value in net.model.state_dict().items()
        if not name.startswith(("fc.", "classifier.")) and not name.endswith(COUNTER)
    }


def find_backbone(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, str]:
    """Return, for each wanted tensor, the name of its match among `weights`.

    Raises ValueError, which says why, where there is no match for all of them, or several.
    """
    weights = preferred(
        {name: value for name, value in weights.items() if not name.endswith(COUNTER)}
    )
    matches = list(matches_by_name(weights, wanted)) or list(matches_by_order(weights, wanted))
    whole = [names for names in matches if not more_layers(weights, names)]
    if not matches:
        raise ValueError(nearest_miss(weights, wanted))
    if not whole:
        raise ValueError(f"it has also {more_layers(weights, matches[0])[0]}")
    if len(whole) > 1:
        there = ", ".join(next(iter(names.values())) for names in whole)
        raise ValueError(f"{len(whole)} of them begin at {there}; save one alone")
    return whole[0]


def preferred(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the copy to take, in a file with two copies of a network."""
    for word in PREFERRED:
        weights = {n: v for n, v in weights.items() if word in n.split(".")} or weights
    return weights


def matches_by_name(weights, wanted):
    """Yield the matches where all wanted names stand under one prefix, with their shapes."""
    for prefix in prefixes(weights, wanted):
        if all(shape(weights, prefix + name) == value.shape for name, value in wanted.items()):
            yield {name: prefix + name for name in wanted}


def prefixes(weights, wanted):
    """List what stands before the first wanted name where it occurs."""
    first = next(iter(wanted))
    return [name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")]


def matches_by_order(weights, wanted):
    """Yield the matches where layers follow one another as wanted, under names of their own.

    Such as the numbered children of an nn.Sequential, `4.0.conv1.weight` for
    `layer1.0.conv1.weight`, or `_blocks.0._bn1.weight` for `blocks.0.0.bn1.weight`. All shapes and
    last words agree, what is one layer here is one there, and numbers of layers never go down.
    """
    names = list(weights)
    for start in range(len(names) - len(wanted) + 1):
        there = names[start : start + len(wanted)]
        fits = all(
            weights[theirs].shape == value.shape and last_word(theirs) == last_word(ours)
            for theirs, (ours, value) in zip(there, wanted.items(), strict=True)
        )
        if fits and same_layers(there, wanted) and ascending(there):
            yield dict(zip(wanted, there, strict=True))


def same_layers(names, others):
    """Tell whether each layer of one list of names is one of the other list."""
    pairs = set(zip(map(parent, names), map(parent, others), strict=True))
    return all(len({pair[side] for pair in pairs}) == len(pairs) for side in (0, 1))


def ascending(names):
    """Tell whether layers with numbers stand in the order of these."""
    last = {}
    for name in names:
        words = name.split(".")
        for place, word in enumerate(words):
            if word.isdecimal():
                before = tuple(words[:place])
                if int(word) < last.get(before, 0):
                    return False
                last[before] = int(word)
    return True


def more_layers(weights, names):
    """List the weights that a network has inside its backbone beside those in `names`.

    Numbered layers below the backbone's own parts, as in a deeper network, and convolutions beside
    these parts, as fast-reid's non-local blocks. A classifier is neither.
    """
    used = [name.split(".") for name in names.values()]
    shared = takewhile(lambda words: len(set(words)) == 1, zip(*used, strict=False))
    root = [words[0] for words in shared]
    parts = {tuple(words[: len(root) + 1]) for words in used}
    more = []
    for name in weights:
        words = name.split(".")
        if words in used or words[-1] != "weight" or words[: len(root)] != root:
            continue
        below = tuple(words[: len(root) + 1]) in parts
        numbered = re.search(r"\d", ".".join(words[len(root) + 1 :]))
        if (below and numbered) or (root and weights[name].dim() == 4):
            more.append(name)
    return more


def parent(name):
    """Return a dotted name without its last word."""
    return name.rpartition(".")[0]


def last_word(name):
    """Return the last word of a dotted name."""
    return name.rpartition(".")[2]


def shape(weights, name):
    """Return a tensor's shape, None where there is no such tensor."""
    return weights[name].shape if name in weights else None


def nearest_miss(weights, wanted):
    """Say what is amiss at the prefix under which most wanted names stand."""
    hits = {p: sum(p + name in weights for name in wanted) for p in prefixes(weights, wanted)}
    prefix = max(hits, key=hits.get, default=None)
    if prefix is None or hits[prefix] < len(wanted) / 2:
        return f"its {len(weights)} tensors nowhere follow one another as that backbone's do"
    for name, value in wanted.items():
        found = shape(weights, prefix + name)
        if found is None:
            return f"it has no {prefix}{name}"
        if found != value.shape:
            return f"{prefix}{name} is {tuple(found)}, not {tuple(value.shape)}"
    raise AssertionError("all are there")


def summary(names: list[str]) -> str:
    """Name the tensors that were left out, those of one layer together."""
    counts = {}
    for name in names:
        layer, _, word = name.rpartition(".")
        first = layer if layer and word in NORM else name
        counts[first] = counts.get(first, 0) + 1
    parts = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return ", ".join(parts[:NAMED]) + more


# --- a whole network of another code ------------------------------------------------------------


def is_ours(path: str | Path) -> bool:
    """Tell whether a weights file holds a network of this code. Raises as `read_weights`."""
    weights = read_weights(path)
    with suppress(KeyError, TypeError, ValueError):
        options_of(weights)
        return True
    return False


def foreign_network(
    path: str | Path, backbone: str, last_stride: int, size: tuple[int, int]
) -> tuple[ReIDNet, list[str]]:
    """Make a network of another code's weights, to take features from.

    Its features are the pooled ones, by GeM where the file has an exponent: layer "pool"; where it
    has a batch norm neck they are, after that, layer "bottleneck".
    Returns it and lines that say what was found. Raises UserError.
    """
    weights = read_weights(path)
    exponent = exponent_in(preferred(weights), path)
    pooling = "gem" if exponent else "avg"
    with as_user_errors(backbone):
        net = make_network(backbone, 1, pooling=pooling, last_stride=last_stride)
    left_out = fill_backbone(net, weights, path, size)
    neck = neck_in(preferred({name: weights[name] for name in left_out}), net.feature_dim)
    net.bnneck = bool(neck)
    net.model.fc = nn.Sequential(nn.BatchNorm1d(net.feature_dim)) if neck else nn.Identity()
    lines = []
    if exponent:
        net.pooling.p.data = weights[exponent].float().reshape(())
        left_out.remove(exponent)
        lines.append(f"pooled by GeM, with the exponent {net.pooling.p.item():.2f} of {exponent}")
    if neck:
        values = {word: weights[f"{neck}.{word}"] for word in NORM}
        net.model.fc[0].load_state_dict(values, strict=False)
        left_out = [name for name in left_out if parent(name) != neck]
        lines.append(f"features after the batch norm {neck}")
    if left_out:
        lines.append(f"left out: {summary(left_out)}")
    return net.float(), lines


def exponent_in(weights, path):
    """Return the name of GeM's exponent; None where there is none."""
    names = [n for n, v in weights.items() if last_word(n) == "p" and v.numel() == 1]
    if len(names) > 1:
        raise UserError(f"{path}: has several exponents of GeM: {', '.join(names)}; keep one")
    return names[0] if names else None


def neck_in(weights, dim):
    """Return the name of a batch norm over `dim` features, if any.

    Of several, as of networks with a neck for each part of a body, it is the first. One that stands
    beside a layer with as many outputs belongs to that.
    """
    for name in weights:
        module, _, word = name.rpartition(".")
        if word != NORM[0] or any(shape(weights, f"{module}.{w}") != (dim,) for w in NORM):
            continue
        beside = [v for n, v in weights.items() if parent(parent(n)) == parent(module)]
        if not any(value.dim() > 1 and len(value) == dim for value in beside):
            return module
    return None
