"""Measures the input pipeline, beside the rate that a model needs, and what bounds it.

    python tools/profile_input.py
    python tools/profile_input.py --data_name folder --data_path PICTURES --image_size 256
    python tools/profile_input.py --data_name latents --data_path LATENTS \\
        --model MDTv2-XL/2 --device "NVIDIA H200" --num_devices 8 --processes 1 --mfu 0.4

Without data it makes both kinds in a temporary folder: 256-pixel crops of JPEG photographs of
ImageNet's usual size, and a cache of 32 x 32 x 4 latents in float16. Each line is a number of
workers (0: threads), in examples a second of this process. What Pillow alone does with the same
JPEGs on the same cores is measured in turns with the pipeline. Everything is read more than once,
so from the page cache: a slow disk shows in no number but the first pass over data that are larger
than the memory. The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from mdt_jax import flops, masking, metrics
from mdt_jax.config import apply_recipe, default_config
from mdt_jax.data import (
    LATENT_SCALE,
    ExampleStream,
    Source,
    center_crop,
    create_batches,
    create_source,
    latent_cache,
    to_unit_range,
)
from mdt_jax.data.decoding import decode_picture
from mdt_jax.data.folders import ImageFolder
from mdt_jax.models import create_model

CORES = len(os.sched_getaffinity(0))
JPEG_SIZE = (500, 375)  # ImageNet's commonest
Rates = dict[str, float]


def profile(source: Source, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates by number of workers, and of Pillow alone, medians of the rounds; time by stage."""
    size = None if source.latents else arguments.image_size
    batch_size = arguments.batch_size or (256 if source.latents else 32)
    rivals: dict[str, Callable[[], float]] = {
        f"{workers} workers": lambda n=workers: pipeline_rate(
            source, size, batch_size, n, arguments
        )
        for workers in arguments.workers
    }
    files = jpegs(source)
    if files:
        for name, pool in (("threads", ThreadPoolExecutor), ("processes", spawned)):
            rivals[f"Pillow alone, {CORES} {name}"] = lambda pool=pool: pillow_rate(
                files, size, pool, arguments.seconds
            )
    rounds = [{name: rival() for name, rival in rivals.items()} for _ in range(arguments.rounds)]
    rates = {name: statistics.median(r[name] for r in rounds) for name in rivals}
    result = {
        "source": source.name,
        "examples_per_second": rates,
        "rounds": rounds,
        "microseconds_by_stage": {k: 1e6 * v for k, v in stages(source, size).items()},
    }
    if files:  # round by round: what else the cores do changes from one to the next
        pairs = map(best_rates, rounds)
        result["of_pillow"] = statistics.median(ours / alone for ours, alone in pairs)
    return result


def best_rates(rates: Rates) -> tuple[float, float | None]:
    """The pipeline's fastest, and Pillow's."""
    alone = [rate for name, rate in rates.items() if name.startswith("Pillow")]
    ours = [rate for name, rate in rates.items() if not name.startswith("Pillow")]
    return max(ours), max(alone, default=None)


def pipeline_rate(
    source: Source,
    size: int | None,
    batch_size: int,
    num_workers: int,
    arguments: argparse.Namespace,
) -> float:
    """Examples a second of batches as training takes them, on the host."""
    with create_batches(
        source,
        global_batch_size=batch_size,
        seed=0,
        process_index=0,
        process_count=1,
        flip=True,
        image_size=size,
        num_workers=num_workers,
        read_ahead=arguments.read_ahead,
    ) as batches:
        # What was read ahead while the workers started is no rate.
        for _ in range(arguments.read_ahead + 1):
            next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < arguments.seconds or count < arguments.read_ahead:
            next(batches)
            count += 1
        return count * batch_size / (time.perf_counter() - began)


# Pillow alone


def jpegs(source: Source) -> list[str]:
    """The first files of a folder of images; other sources have none."""
    if not isinstance(source.records, ImageFolder):
        return []
    return [str(source.records.path / file) for file in source.records.files[:1000]]


def spawned(workers: int) -> Executor:
    """Processes that hold nothing but this file's imports."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def pillow_rate(
    files: list[str], size: int, pool: Callable[[int], Executor], seconds: float
) -> float:
    """Images a second that every core together decodes and crops, and puts nowhere."""
    with pool(CORES) as workers:
        list(workers.map(pillow_crops, [(files[:2], size, 0.0)] * CORES))
        shares = [files[k::CORES] or files for k in range(CORES)]
        began = time.perf_counter()
        counts = workers.map(pillow_crops, [(share, size, seconds) for share in shares])
        return sum(counts) / (time.perf_counter() - began)


def pillow_crops(task: tuple[list[str], int, float]) -> int:
    """Decodes and crops files one after the other for so many seconds; returns how many."""
    files, size, seconds = task
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        pillow_crop(files[count % len(files)], size)
        count += 1
    return count


def pillow_crop(file: str, size: int) -> np.ndarray:
    """ADM's centre crop in plain Pillow, from a file to uint8."""
    with Image.open(file) as picture:
        picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


# What takes the time


def stages(source: Source, size: int | None, count: int = 256) -> dict[str, float]:
    """Seconds of one thread for each part of an example."""
    indices = np.random.default_rng(0).integers(len(source), size=count)
    if hasattr(source.records, "read_posteriors"):
        reading = best(lambda: source.records.read_posteriors(indices)) / count
        blocks = itertools.count()
        stream = ExampleStream(source, seed=0, flip=True)
        whole = best(lambda: stream.block(next(blocks) * count, count)) / count
        return {"reading": reading, "order and flips": max(whole - reading, 0.0)}
    if source.latents:
        return {"reading": best(lambda: source.__getitems__(indices.tolist())) / count}
    found: dict[str, float] = {}
    indices = indices[:64].tolist()
    if isinstance(source.records, ImageFolder):
        paths = [source.records.path / source.records.files[i] for i in indices]
        contents = [path.read_bytes() for path in paths]
        found["reading"] = best(lambda: [path.read_bytes() for path in paths]) / len(paths)
        found["decoding"] = best(lambda: [decode_picture(c, "") for c in contents]) / len(paths)
    else:
        found["reading and decoding"] = best(lambda: source.pictures(indices)) / len(indices)
    images = [example["image"] for example in source.pictures(indices)]
    cropped = images
    if size is not None:
        found["cropping"] = best(lambda: [center_crop(x, size) for x in images]) / len(images)
        cropped = [center_crop(x, size) for x in images]
    block = np.empty((len(cropped), *cropped[0].shape), np.float32)

    def batch() -> None:
        for k, image in enumerate(cropped):
            to_unit_range(image, block[k])

    found["batching"] = best(batch) / len(cropped)
    return found


def best(function: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of a few calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken)


def noise_seconds() -> float:
    """Of a thread to draw one latent's 4,096 normal numbers, which the training step does."""
    rng, out = np.random.Generator(np.random.Philox(0)), np.empty(4096, np.float32)
    return best(lambda: [rng.standard_normal(out=out, dtype=np.float32) for _ in range(100)]) / 100


# What a model needs


def needed_rate(arguments: argparse.Namespace) -> float | None:
    """Examples a second of one process; None where it is not known."""
    if arguments.images_per_second:
        return arguments.images_per_second / arguments.processes
    peak = metrics.peak_flops(arguments.device, "bfloat16") if arguments.device else None
    if peak is None:
        if arguments.device:
            raise ValueError(
                f"--device {arguments.device!r}: its peak is not known; give --images_per_second"
            )
        return None
    config = default_config()
    config.model.name = arguments.model
    apply_recipe(config)
    model, ratio = create_model(arguments.model), config.masking
    kept = None
    if model.supports_masking:
        counts = masking.kept_counts(model.num_tokens, ratio.ratio, ratio.ratio_span)
        kept = float(np.dot(*counts))
    work = flops.train_step_flops(model, 1, kept)
    return arguments.mfu * peak * arguments.num_devices / work / arguments.processes


# Data to measure with


def synthetic_jpegs(folder: Path, count: int) -> Source:
    """Cuts of scikit-learn's photographs, enlarged a little, as JPEGs of two classes."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(count):
        picture = photographs[i % 2]
        width = int(rng.integers(320, 560))
        height = width * JPEG_SIZE[1] // JPEG_SIZE[0]
        left, top = (
            int(rng.integers(a - b)) for a, b in zip(picture.size, (width, height), strict=True)
        )
        box = (left, top, left + width, top + height)
        file = folder / str(i % 2) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.resize(JPEG_SIZE, Image.Resampling.BICUBIC, box).save(file, quality=92)
    return create_source(ml_collections.ConfigDict({"name": "folder", "path": str(folder)}))


def synthetic_latents(folder: Path, count: int) -> Source:
    """Random posteriors of images and their mirror images, in ImageNet's form."""
    description = latent_cache.Description(
        source="random numbers", num_images=count, class_names=tuple(map(str, range(1000))),
        image_size=256, vae="none", vae_digest="", scale=LATENT_SCALE, compute_dtype="float32",
        latent_shape=(32, 32, 4), dtype="float16", mirror=True, images_per_shard=256,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    latent_cache.begin(folder, description)

    def records(images: range) -> Iterator[np.ndarray]:
        rows = np.zeros((len(images), 2), description.record_type)
        rows["index"] = np.array(images)[:, None]
        rows["label"] = rows["index"] % 1000
        rows["posterior"] = rng.standard_normal(rows["posterior"].shape, np.float32)
        yield rows.reshape(-1)

    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        latent_cache.write_shard(folder, description, shard, records(images))
    latent_cache.finish(folder, description)
    return create_source(ml_collections.ConfigDict({"name": "latents", "path": str(folder)}))


# The command


def table(kind: str, result: dict[str, Any], needed: float | None) -> str:
    """The measurement for a person."""
    rates, parts = result["examples_per_second"], result["microseconds_by_stage"]
    unit = f"{kind}/s"
    lines = [f"{result['source']}", f"{'':32}{unit:>12}{'µs each':>12}"]
    lines += [f"{name:32}{rate:12,.0f}{1e6 / rate:12,.1f}" for name, rate in rates.items()]
    if needed:
        lines.append(f"{'the model needs':32}{needed:12,.0f}{1e6 / needed:12,.1f}")
    ours, pillow = best_rates(rates)
    if pillow:
        lines.append(f"{'of the best of Pillow alone':32}{result['of_pillow']:12.0%}")
    lines.append(
        "one thread's time               "
        + ", ".join(f"{name} {part:,.1f} µs" for name, part in parts.items())
    )
    slowest = max(parts, key=parts.get)
    bound = f"{slowest} takes {parts[slowest] / sum(parts.values()):.0%} of the work"
    if needed:
        enough = "the pipeline keeps up" if ours >= needed else "the model waits for the pipeline"
        bound = f"{enough} ({ours / needed:.1f} times what is needed); {bound}"
    return "\n".join([*lines, bound])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_name", help="as config.data.name; both kinds are made without")
    parser.add_argument("--data_path", default="", help="as config.data.path")
    parser.add_argument("--data_split", default="train", help="as config.data.split")
    parser.add_argument("--image_size", type=int, default=256, help="of crops")
    parser.add_argument("--batch_size", type=int, help="of this process; 256 latents, 32 images")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--read_ahead", type=int, default=4, help="as config.data.read_ahead")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="whose median is given")
    parser.add_argument("--model", default="MDTv2-XL/2", help="whose need is compared")
    parser.add_argument("--images_per_second", type=float, help="that it trains at")
    parser.add_argument("--device", help="or what it trains on, as JAX calls it")
    parser.add_argument("--num_devices", type=int, default=1, help="of all processes")
    parser.add_argument("--processes", type=int, default=1, help="that share the reading")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOP/s utilisation")
    parser.add_argument("--examples", type=int, default=4096, help="latents to make")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command: one clear line and exit status 1 for what a user can mend."""
    arguments = parse(argv)
    jax.config.update("jax_platforms", "cpu")
    results: dict[str, Any] = {"cores": CORES}
    try:
        needed = needed_rate(arguments)
        results["needed"] = needed
        if arguments.data_name:
            config = {"name": arguments.data_name, "path": arguments.data_path}
            source = create_source(
                ml_collections.ConfigDict(config | {"split": arguments.data_split})
            )
            measure(source, arguments, results)
        else:
            with tempfile.TemporaryDirectory() as folder:
                measure(synthetic_jpegs(Path(folder) / "jpeg", 256), arguments, results)
                latents = synthetic_latents(Path(folder) / "latents", arguments.examples)
                measure(latents, arguments, results)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(json.dumps(results))


def measure(source: Source, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    kind = "latents" if source.latents else "images"
    results[kind] = profile(source, arguments)
    print(table(kind, results[kind], results["needed"]))
    if source.latents:
        noise = noise_seconds()
        results["noise_microseconds"] = 1e6 * noise
        print(f"(not in it: a latent's noise, {1e6 * noise:,.1f} µs, which the devices draw)")
    print(flush=True)


if __name__ == "__main__":
    main()
