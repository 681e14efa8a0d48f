"""The run folder `model/<name>/`: options, log, weights, what resumption needs, results.

    opts.json        all options, the command line, versions, git commit, dataset fingerprint
    log.jsonl        a line an epoch
    net_best.pth     weights of the epoch with the lowest validation error
    net_last.pth     weights of the newest epoch; net_<epoch>.pth: every --save_every epochs
    state.pth        weights, optimiser and history, for --resume; state_previous.pth: those of
                     the epoch before, should the newest be damaged
    train.jpg        loss and error curves
    testing.json     with --val_ids, the layer and image size that find held-out people best
    results.json     the last word of each script that measured this run

Other scripts add their own: threshold.json (evaluate.py), features_* (export.py), cross_*.mat
(cross_test.py), tensorboard/.

A `net_*.pth` is a plain state_dict without DataParallel's `module.` prefix; of a timm backbone it
also has a tensor of bytes that names the backbone and its normalisation. state.pth is the
truth: it is written first, and whatever else a kill kept from being written is written again from
it when the run is resumed.
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import torch
from torch import nn

from model import LAYERS, ReIDNet
from reid.errors import UserError, explanation, first_line, is_first, say
from reid.files import (
    cannot_write,
    check_types,
    demand,
    link,
    locked,
    parents_of,
    read_json,
    read_results,
    replacing,
    sha256,
    update_results,
    write_json,
    write_text,
)
from reid.options import HEIGHT, WIDTH, backbone_of, image_size, training_defaults
from reid.provenance import provenance
from reid.transforms import EvalTransform, transform_for_testing
from reid.weights import as_user_errors, foreign_network, is_ours, load_network

# Flags that may differ when a run is resumed. On another device the run then goes on, but not bit
# for bit as it would have.
FREE_ON_RESUME = set("epochs lr workers gpu_ids resume save_every tensorboard cache".split())
# Of these paths the contents are compared, not the names.
FREE_ON_RESUME |= set("name model_dir data_dir gen_dir label_run".split())
# Facts that must be the same, and how the error says that they are not.
SAME_ON_RESUME = {
    "loss": "by another script or label rule",
    "class_num": "with another number of classes",
    "dataset": "on other images",
    "held_out": "with other images held out",
    "label_run_sha256": "by another --label_run",
}
OPTION_TYPES = {"height": int, "width": int, "backbone": str, "pretrained": str}
LARGEST_SIDE = 4096  # pixels of an image to train on
TESTING = "testing.json"
STATE, STATE_BEFORE = "state.pth", "state_previous.pth"


def changed_option(options: dict, before: dict, free: set[str]) -> tuple[str, object] | None:
    """Return the first option that a run was started with otherwise, and its value then.

    options: those asked for; before: the run's own; free: names that may differ. Of a flag that is
    newer than the run, the value that a training has by default counts.
    """
    older = training_defaults()
    for name in sorted(options.keys() - free):
        value = before.get(name, older.get(name, options[name]))
        if options[name] != value:
            return name, value
    return None


class Run:
    """A run folder, `Run("model/ft_ResNet50")`; it is not made until something is saved."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes out of the folder. Raises UserError where one is in it."""
        with parents_of(self.path), locked(self.path):
            yield

    def check_new(self) -> None:
        """Raise UserError where the folder holds a run already."""
        if self.has_weights() or self.has_state():
            raise UserError(
                f"{self.path}: holds a run already; go on with it (--resume), delete it, "
                "or take another --name"
            )

    def start(self, options: dict, facts: dict) -> None:
        """Make the folder with its opts.json: `options` from the command line, `facts` measured."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.file(TESTING).unlink(missing_ok=True)  # of a run whose weights were deleted
        except OSError as error:
            raise cannot_write(self.path, error) from error
        write_json(self.file("opts.json"), {"options": options, **facts, **provenance()})

    def go_on(self, epochs: int, facts: dict) -> None:
        """Add to opts.json the command, code and machine that go on after `epochs` of them.

        The results of its training, by which others know that a run is finished, are removed.
        """
        if "train" in read_results(self.file("results.json")):
            update_results(self.file("results.json"), "train", None)
        path = self.file("opts.json")
        if not path.exists():
            return
        opts = read_json(path, "restore or delete it", options=dict)
        where = ("device", "device_name", "processes", "threads", "arithmetic")
        entry = {"epochs": epochs, **{name: facts[name] for name in where}, **provenance()}
        write_json(path, opts | {"resumed": [*opts.get("resumed", []), entry]})

    def abandon(self) -> None:
        """Take back `start` where training failed before its first epoch was whole."""
        if self.has_weights() or self.has_state():
            return
        with suppress(OSError):  # it is a file, or something of the user's is in it
            self.file("opts.json").unlink(missing_ok=True)
            self.path.rmdir()

    def exists(self) -> bool:
        """Tell whether a run was started here."""
        return self.file("opts.json").exists() or self.has_weights() or self.has_state()

    def has_weights(self) -> bool:
        """Tell whether there are weights; the original's folders have nothing else."""
        return any(self.path.glob("net_*.pth"))

    def has_state(self) -> bool:
        """Tell whether an epoch was saved."""
        return self.file(STATE).exists() or self.file(STATE_BEFORE).exists()

    def check_same(self, options: dict, facts: dict) -> None:
        """Raise UserError unless the run was started with these options on the same data."""
        opts = self.opts()
        if "options" not in opts:
            raise UserError(
                f"--resume: {self.path} has weights, but no opts.json that says how to go on; "
                "check --name and --model_dir, or start anew under another --name"
            )
        for name, what in SAME_ON_RESUME.items():
            if opts.get(name, facts[name]) != facts[name]:  # the run may be of an older version
                raise UserError(f"--resume: {self.path} was trained {what}")
        before = opts["options"]
        free = FREE_ON_RESUME
        if {"imagenet", "none"}.isdisjoint({before.get("pretrained"), options["pretrained"]}):
            free = free | {"pretrained"}  # two files
            one, other = opts.get("pretrained_sha256"), facts["pretrained_sha256"]
            if one and other and one != other:
                raise UserError(f"--resume: {self.path} began with other --pretrained weights")
        if options["schedule"] == "cosine":  # then they decide every epoch's rate
            free = free - {"epochs"}
        if changed := changed_option(options, before, free):
            name, value = changed
            raise UserError(
                f"--resume: {self.path} was started with --{name} {value}, "
                f"not {options[name]}; repeat its own options (see its opts.json)"
            )

    def file(self, name: str) -> Path:
        """Return the path of a file in the run folder."""
        return self.path / name

    def opts(self) -> dict:
        """Read the run's opts.json; empty where there is none, as in a folder of the original."""
        path = self.file("opts.json")
        if not path.exists():
            return {}
        advice = "restore or delete it"
        opts = read_json(path, advice, options=dict)
        options = opts.get("options", {})
        check_types(options, path, advice, use_dense=bool)
        if backbone_of(options):
            options["backbone"] = backbone_of(options)
        check_types(options, path, advice, **OPTION_TYPES)
        if options.get("test_size"):
            check_image_size(options["test_size"], path, advice)
        for side in ("height", "width"):
            if not 1 <= options.get(side, 1) <= LARGEST_SIDE:
                raise UserError(f"{path}: its {side} is {options[side]}; {advice}")
        return opts

    def save_testing(self, found: dict) -> None:
        """Write testing.json: what `reid.selection.choose_testing` found."""
        write_json(self.file(TESTING), found)

    def testing(self) -> dict:
        """Read testing.json: the layer and test size found best; empty where there is none."""
        path = self.file(TESTING)
        if not path.exists():
            return {}
        advice = "restore or delete it"
        found = read_json(path, advice)
        demand(found, path, advice, layer=str, test_size=str)
        if found["layer"] not in LAYERS:
            raise UserError(f"{path}: its layer is {found['layer']!r}; {advice}")
        check_image_size(found["test_size"], path, advice)
        return found

    def save_weights(self, net: nn.Module, label: str | int) -> None:
        """Write `net_<label>.pth`."""
        save(self.file(f"net_{label}.pth"), plain_state(net))

    def save_state(self, state: dict) -> None:
        """Write what --resume needs: a dict of tensors, state_dicts and plain values.

        The one before is kept, as STATE_BEFORE.
        """
        path = self.file(STATE)
        if path.exists():  # stays where it is until the new one takes its name
            with replacing(self.file(STATE_BEFORE)) as temporary:
                link(path, temporary)
        save(path, state)

    def load_state(self) -> dict | None:
        """Load the newest state that can be read, to the CPU; None where no epoch was whole.

        Prints a line where an older one had to be taken. Raises UserError where all are damaged.
        """
        if not self.has_state():
            if self.has_weights():
                raise UserError(f"{self.path}: its {STATE} is gone, can't resume; start anew")
            return None
        for name in (STATE, STATE_BEFORE):
            path = self.file(name)
            try:
                with ZipFile(path) as file:  # torch's own reading would take flipped bits
                    if file.testzip():
                        raise ValueError("checksum differs")
                state = torch.load(path, map_location="cpu", weights_only=True)
            except FileNotFoundError:
                continue
            except Exception as error:  # torch raises many kinds for a damaged file
                if explanation(error):  # full memory, a disk that is away: no damage
                    raise
                say(f"{path}: damaged ({first_line(error)})")
                continue
            if name == STATE_BEFORE:
                # A damaged one must not become the state before the next.
                self.file(STATE).unlink(missing_ok=True)
                say(
                    f"{path}: going on from this, the state before the newest; until that epoch is "
                    "trained again, net_*.pth may be of the damaged one"
                )
            return state
        raise UserError(f"{self.path}: its states are damaged, can't resume; start anew")

    def write_log(self, history: list[dict]) -> None:
        """Write log.jsonl: a JSON line for each epoch of `history`."""
        lines = "".join(json.dumps(line) + "\n" for line in history)
        write_text(self.file("log.jsonl"), lines)

    def weights_file(self, which_epoch: str) -> Path:
        """Return the path of `net_<which_epoch>.pth`; the UserError lists the epochs there are."""
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run; check its name and --model_dir")
        path = self.file(f"net_{which_epoch}.pth")
        if not path.exists():
            there = sorted(p.stem.removeprefix("net_") for p in self.path.glob("net_*.pth"))
            raise UserError(
                f"{path}: no such weights; --which_epoch can be {', '.join(there) or 'nothing yet'}"
            )
        return path


def check_image_size(text, path, advice):
    """Raise UserError where a file's size of images is not one of `options.image_size`."""
    try:
        image_size(str(text))
    except ArgumentTypeError as error:
        raise UserError(f"{path}: its test_size is {error}; {advice}") from None


def weights_hash(pretrained: str) -> str | None:
    """Return the SHA-256 of the file that --pretrained names; None where it names no file."""
    return sha256(pretrained) if Path(pretrained).is_file() else None


class Trained(NamedTuple):
    """A trained network, the file its weights are from, and how its images and features are.

    height, width: of the images that it was trained on. transform: of those that it is tested on.
    layer: of its features, one of `model.LAYERS`.
    """

    net: ReIDNet
    weights: Path
    height: int
    width: int
    transform: EvalTransform
    layer: str


def load_trained(
    run: str | Path,
    which_epoch: str = "last",
    backbone: str | None = None,
    height: int | None = None,
    width: int | None = None,
    layer: str | None = None,
    test_size: str | None = None,
) -> Trained:
    """Load the network of a run folder, as `Trained`.

    backbone: the one that is expected. height, width: in place of what opts.json says; the
    original's folders have none, and were trained at 256 x 128. layer, test_size (see `reid.
    transforms.transform_for_testing`): in place of what training found best on held-out people, or
    was told; else the pooled features, at the backbone's usual size.
    """
    run = Run(run)
    weights = run.weights_file(which_epoch)
    options, found = run.opts().get("options", {}), run.testing()
    net = load_network(weights, backbone)
    return as_trained(
        net,
        weights,
        height or options.get("height", HEIGHT),
        width or options.get("width", WIDTH),
        layer or found.get("layer"),
        test_size or found.get("test_size") or options.get("test_size"),
    )


def load_weights(
    path: str | Path,
    backbone: str | None = None,
    last_stride: int = 2,
    height: int | None = None,
    width: int | None = None,
    layer: str | None = None,
    test_size: str | None = None,
) -> Trained:
    """Load a weights file of another code, or one of ours without its run, as `Trained`.

    Prints what was found in it, and what was left out. The arguments: of the other code's network
    (by default resnet50; one of ours tells its own), and as for `load_trained`. Features of another
    code's network with a batch norm neck are by default those after it, as that code takes them.
    """
    size = height or HEIGHT, width or WIDTH
    if is_ours(path):
        net = load_network(path, backbone)
        if not height and not width and is_first():
            shown = f"{HEIGHT}x{WIDTH} (else add --height and --width, or name the run with --name)"
            print(f"{path}: doesn't tell the size of its training images; taken for {shown}")
        return as_trained(net, Path(path), *size, layer, test_size)
    test_size = test_size or "same"
    net, lines = foreign_network(path, backbone or "resnet50", last_stride, size)
    for line in lines if is_first() else ():
        print(f"{path}: {line}")
    if layer == "bottleneck" and not net.bnneck:
        raise UserError(f"--which_layer bottleneck: {path} has no batch norm neck; leave it out")
    layer = layer or ("bottleneck" if net.bnneck else "pool")
    return as_trained(net, Path(path), *size, layer, test_size)


def as_trained(
    net: ReIDNet,
    weights: Path,
    height: int,
    width: int,
    layer: str | None = None,
    kind: str | None = None,
) -> Trained:
    """Return the `Trained` of a network, made ready for images of the size for testing.

    layer: of its features; None: the pooled ones. kind: the size, see
    `reid.transforms.transform_for_testing`; None: the backbone's usual one.
    """
    kind = kind or ("enlarged" if net.classic else "center")
    transform = transform_for_testing(kind, height, width)
    with as_user_errors(net.backbone):
        net.set_size(*transform.size)
    return Trained(net, weights, height, width, transform, layer or "pool")


def load_asked(args: Namespace) -> Trained:
    """Load the network that the options of `add_run_options` and `add_feature_options` name."""
    how = args.height, args.width, args.which_layer, args.test_size
    if args.weights:
        return load_weights(args.weights, args.backbone, args.last_stride, *how)
    return load_trained(Path(args.model_dir) / args.name, args.which_epoch, args.backbone, *how)


def unwrap(net: nn.Module) -> nn.Module:
    """Return the network itself, out of DataParallel or DistributedDataParallel."""
    return net.module if hasattr(net, "module") else net


def plain_state(net: nn.Module) -> dict:
    """Return the state_dict without prefix, in the default memory layout, on the CPU."""
    return {
        name: value.detach().cpu().contiguous() for name, value in unwrap(net).state_dict().items()
    }


def save(path: str | Path, content: dict) -> None:
    """Save with torch.save, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch says that the disk is full
            raise (error.__context__ or OSError(0, first_line(error))) from error
