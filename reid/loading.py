"""From files to batches: the datasets and loaders of training and extraction."""

from torch.utils.data import DataLoader, Dataset

from reid.dataset import read_image


class ImageDataset(Dataset):
    """Samples or TestImages as (transformed image, *the entry's other fields)."""

    def __init__(self, entries, transform):
        self.entries = entries
        self.transform = transform

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        path, *fields = self.entries[index]
        return self.transform(read_image(path)), *fields


def train_loader(samples, transform, batchsize, workers, device):
    """Shuffled batches (images, labels, generated); the incomplete last batch is left out.

    Batch norm needs full batches; of a set smaller than one batch, all of it is one.
    """
    return DataLoader(
        ImageDataset(samples, transform),
        batch_size=min(batchsize, len(samples)),
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )


def eval_loader(entries, transform, batchsize, workers, device):
    """Batches in the order of `entries`, each entry once."""
    return DataLoader(
        ImageDataset(entries, transform),
        batch_size=batchsize,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
