"""The collapse watch, and trainings whose numbers are no numbers any more."""

import signal

import checkpoint
import errors
import main
import numpy as np
import pytest
import training
import watch
from conftest import StubGAN, random_people
from errors import UserError

PEOPLE = random_people(64)
# Three figures over and over, with noise: what a collapsed generator draws.
NOISE = np.random.default_rng(1).integers(0, 60, PEOPLE.shape)
THREE = PEOPLE[np.arange(64) % 3] // 2 + NOISE.astype(np.uint8)


def train(gan, folder):
    """Train a stub for six epochs in `folder`/run; returns its log.jsonl."""
    args = main.get_parser().parse_args(["--train", "--save_every", "1", "--epoch", "6"])
    args.batch_size, args.seed, args.sample_dir = 64, 0, folder / "samples"
    log = training.start_log(folder / "run", {}, gan.epochs + 1)
    training.train(gan, PEOPLE, args, folder / "run", log)
    return log


def test_noise_on_a_few_figures_is_no_diversity():
    assert watch.diversity(PEOPLE) > 0.1
    assert watch.diversity(THREE) < 0.2 * watch.diversity(PEOPLE)


def test_diversity_is_the_mean_distance_to_the_nearest_image():
    blocks = PEOPLE[:, ::8, ::8].reshape(64, -1) / 255
    distances = np.sqrt(((blocks[:, None] - blocks) ** 2).mean(axis=2))
    np.fill_diagonal(distances, np.inf)
    assert watch.diversity(PEOPLE) == pytest.approx(distances.min(axis=1).mean(), abs=1e-6)


def test_a_collapse_is_warned_of_and_keeps_the_healthy_checkpoint(tmp_path, capsys):
    log = train(StubGAN(PEOPLE, THREE), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all("diversity (a collapse?)" in line for line in lines)
    assert all("--which healthy" in line for line in lines)
    assert ["warning" in line for line in log.read_text().splitlines()] == [False] * 2 + [True] * 4
    run = tmp_path / "run"
    assert checkpoint.load(run / "healthy.npz")[0]["done"].tolist() == [2, 2, 0]
    assert [path.name for path in checkpoint.numbered(run)] == ["ckpt-0005.npz", "ckpt-0006.npz"]


def test_samples_that_never_were_varied_are_warned_of_at_the_end(tmp_path, capsys):
    train(StubGAN(PEOPLE, THREE), tmp_path)
    # A new run in a folder whose checkpoints were deleted has no healthy one.
    run = tmp_path / "run"
    for path in checkpoint.numbered(run):
        path.unlink()
    training.start_log(run, {}, 1)
    assert not (run / "healthy.npz").exists()
    capsys.readouterr()
    train(StubGAN(THREE, THREE), tmp_path)
    warning = capsys.readouterr().err
    assert "(a collapse?); train longer" in warning and len(warning.splitlines()) == 1
    assert not (run / "healthy.npz").exists()


class NoLoss(StubGAN):
    def train_step(self, real):
        return np.nan, 1.0


class NoWeight(StubGAN):
    def state(self):
        return super().state() | {"weight": np.array([1, np.inf])}


class Stopped(NoWeight):
    def train_step(self, real):
        signal.raise_signal(signal.SIGINT)
        return super().train_step(real)


def test_a_weight_that_is_no_number_when_stopped_is_of_the_epoch_at_hand(tmp_path):
    with pytest.raises(UserError, match="in epoch 1 the loss or a weight is no number"):
        train(Stopped(PEOPLE, THREE), tmp_path)


@pytest.mark.parametrize("broken", [NoLoss, NoWeight])
def test_a_loss_or_weight_that_is_no_number_ends_the_training(broken, tmp_path):
    """It leaves the checkpoints as they are."""
    train(StubGAN(PEOPLE, THREE), tmp_path)
    run = tmp_path / "run"
    kept = {path: path.read_bytes() for path in run.glob("*.npz")}
    assert len(kept) == 3
    gan = broken(PEOPLE, THREE)
    main.restore(gan, checkpoint.numbered(run)[-1])
    gan.epochs = 5
    with pytest.raises(UserError, match="is no number any more"):
        train(gan, tmp_path)
    assert {path: path.read_bytes() for path in run.glob("*.npz")} == kept


def test_a_closed_terminal_ends_a_training_and_an_ignored_signal_does_not():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's background
    try:
        with errors.postponed_interrupts() as caught:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGHUP)
        assert caught == [signal.SIGHUP]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
