"""The device to compute on, and the arithmetic to compute in."""

import copy
import ctypes
import platform
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reid.errors import UserError
from reid.options import PRECISIONS

GPUMemoryError = torch.cuda.OutOfMemoryError
# Of the trial that chooses between bf16 and fp32: images on a CPU and on a GPU, which a few would
# not keep busy; steps, the first of which is slow and never counts; how much slower bf16 may be.
TRIAL_IMAGES, TRIAL_STEPS, CLEARLY = (8, 64), 3, 1.2
SAFE_CHANNELS = 8  # of a 1x1 convolution's input, see `avoid_crash`
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h's names for mallopt


def choose_device(gpu_ids: str | None = None) -> tuple[torch.device, list[int]]:
    """Return the device to compute on and the list of GPUs for DataParallel (empty: none).

    gpu_ids: None chooses by itself; "-1" is the CPU, "0" one GPU, "0,1" two.
    """
    if gpu_ids is None:
        if torch.cuda.is_available():
            return torch.device("cuda", 0), []
        if torch.backends.mps.is_available():
            return torch.device("mps"), []
        return torch.device("cpu"), []
    try:
        ids = [int(text) for text in gpu_ids.split(",")]
    except ValueError:
        raise UserError(f"--gpu_ids {gpu_ids}: expected numbers like 0 or 0,1, or -1") from None
    if ids == [-1]:
        return torch.device("cpu"), []
    count = torch.cuda.device_count()
    for gpu in ids:
        if not 0 <= gpu < count:
            raise UserError(
                f"--gpu_ids {gpu_ids}: no CUDA GPU {gpu} here ({count} found); "
                "leave the flag out or pass -1 for the CPU"
            )
    return torch.device("cuda", ids[0]), ids if len(ids) > 1 else []


def device_name(device: torch.device) -> str | None:
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        torch.cpu.get_capabilities().get("cpu_name")
        if hasattr(torch.cpu, "get_capabilities")
        else platform.processor()
    )


def set_up(device: torch.device) -> None:
    """Set the whole process up for speed on the device: in scripts, not in others' programs."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all batches have one size
        torch.set_float32_matmul_precision("high")  # TF32: what fp32 is left on tensor cores
    if device.type == "cpu":
        keep_memory()


def to_device(net: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, in its layout."""
    if device.type == "cpu":
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                avoid_crash(part)
    return net.to(device, memory_format=layout(device))


def avoid_crash(convolution):
    """Take the stride out of a 1x1 convolution of few channels: its input is thinned out before.

    The sums are the same. With strides, PyTorch 2.14's gradients of such a layer in channels_last
    (of RepVGG, MobileOne, FastViT) write beyond their memory on a CPU.
    """
    few = convolution.in_channels // convolution.groups < SAFE_CHANNELS
    if convolution.kernel_size == (1, 1) and few and max(convolution.stride) > 1:
        down, across = convolution.stride
        convolution.stride = (1, 1)
        convolution.register_forward_pre_hook(lambda _, x: (x[0][:, :, ::down, ::across],))


def layout(device: torch.device) -> torch.memory_format:
    """Return the memory layout in which the device's convolutions are fastest.

    On Apple's GPUs the usual one: in channels_last, PyTorch's batch norm has wrong gradients there
    (pytorch issue 175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_memory():
    """Have Linux's malloc keep large blocks that are freed, for the next batch to take.

    By itself it gives back whatever is over 32 MB, and the system clears each page anew when it
    is asked for again: for batch norm over such a tensor three quarters of the time.
    """
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def dtype_for(
    device: torch.device, precision: str = "auto", gpus: Sequence[int] = ()
) -> torch.dtype | None:
    """Return the dtype to autocast to, or None for plain fp32.

    "auto" takes bf16 where the hardware multiplies in it: elsewhere it would only be slower. (Where
    it does, `faster_dtype` asks the network at hand.)
    DataParallel's threads forget autocast's dtype and would compute in fp16: fp32 there.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if gpus and precision == "bf16":
        raise UserError("--precision bf16: DataParallel can't; use one GPU or --precision fp32")
    if precision == "auto":
        precision = "bf16" if not gpus and computes_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the name of the arithmetic that a dtype stands for: "float32" for None."""
    return str(dtype or torch.float32).removeprefix("torch.")


def faster_dtype(
    net: nn.Module,
    device: torch.device,
    size: tuple[int, int],
    batchsize: int,
    training: bool = False,
) -> torch.dtype | None:
    """Return the dtype in which a network computes faster, by a short trial: bf16, or None, fp32.

    Depthwise convolutions are slower in bf16 on some processors, though others are twice
    as fast. size: height and width of the images. batchsize: of the work that follows, which the
    trial does not exceed. training: whether gradients are computed, too. Chance must not decide, so
    fp32 has to win clearly. The network stays as it is.
    """
    net = to_device(copy.deepcopy(net), device).train(training)
    number = min(TRIAL_IMAGES[device.type == "cuda"], batchsize)
    images = torch.zeros(number, 3, *size, device=device)
    images = images.contiguous(memory_format=layout(device))
    seconds = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for dtype in (torch.bfloat16, None):
            times = [seconds_of_step(net, images, dtype, training) for _ in range(TRIAL_STEPS)]
            seconds.append(min(times))
    if device.type == "cuda":
        del net, images
        torch.cuda.empty_cache()  # what fp32 took is more than bf16 will need
    bf16, fp32 = seconds
    return torch.bfloat16 if bf16 < CLEARLY * fp32 else None


def seconds_of_step(net, images, dtype, training):
    """Return how long a step takes on images [B, 3, H, W]."""
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        with autocast(images.device, dtype):
            features = net(images, return_features=True).float()
        if training:
            features.square().sum().backward()
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start


def computes_bf16(device: torch.device) -> bool:
    """Tell whether the device has fast bf16 arithmetic."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch can't tell: fp32
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return a context that computes in `dtype` where that is safe; None changes nothing."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; to a GPU without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
