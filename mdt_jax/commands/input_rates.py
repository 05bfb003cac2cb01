"""Rates of an input pipeline, of Pillow alone, and of its stages: for `mdt profile-input`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import statistics
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

from mdt_jax import data
from mdt_jax.config import apply_recipe, default_config
from mdt_jax.data import (
    ExampleStream,
    Source,
    center_crop,
    create_batches,
    create_source,
    latent_cache,
    latent_writing,
)
from mdt_jax.data.decoding import decode_picture
from mdt_jax.data.folders import ImageFolder
from mdt_jax.data.stream import CROPS, epoch_order
from mdt_jax.models import create_model, flops
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE
from mdt_jax.parallel.devices import peak_flops

CORES = len(os.sched_getaffinity(0))
JPEG_SIZE = (500, 375)  # ImageNet's commonest
SEED = 0
ALONE = "Pillow alone"
Rates = dict[str, float]


def profile(source: Source, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a source: rates by number of workers and of Pillow alone, and each stage's time.

    Rates are medians of the rounds.
    """
    size = None if source.latents else arguments.image_size
    batch_size = arguments.batch_size or (256 if source.latents else 32)
    rivals: dict[str, Callable[[], float]] = {
        f"{workers} workers": lambda n=workers: pipeline_rate(
            source, size, batch_size, n, arguments
        )
        for workers in arguments.workers
    }
    files = image_files(source)
    if files:
        for name, pool in (("threads", ThreadPoolExecutor), ("processes", spawned)):
            rivals[f"{ALONE}, {CORES} {name}"] = lambda pool=pool: pillow_rate(
                files, size, arguments.crop, pool, arguments.seconds
            )
    rounds = [{name: rival() for name, rival in rivals.items()} for _ in range(arguments.rounds)]
    result = {
        "source": source.name,
        "examples_per_second": medians(rounds),
        "rounds": rounds,
        "microseconds_by_stage": {k: 1e6 * v for k, v in stages(source, size).items()},
    }
    if files:
        result["of_pillow"] = medians([parts_of_pillow(rates) for rates in rounds])
    return result


def medians(rounds: list[Rates]) -> Rates:
    """Each rate's median over the rounds."""
    return {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}


def parts_of_pillow(rates: Rates) -> Rates:
    """Each pipeline's rate as a part of Pillow's best rate in the same round.

    The cores' other work changes from one round to the next.
    """
    alone = max(rate for name, rate in rates.items() if name.startswith(ALONE))
    return {name: rate / alone for name, rate in rates.items() if not name.startswith(ALONE)}


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
        seed=SEED,
        process_index=0,
        process_count=1,
        flip=True,
        image_size=size,
        num_workers=num_workers,
        read_ahead=arguments.read_ahead,
        crop=arguments.crop,
    ) as batches:
        # Batches that were read ahead while the workers started are not counted.
        for _ in range(arguments.read_ahead + 1):
            next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < arguments.seconds or count < arguments.read_ahead:
            next(batches)
            count += 1
        return count * batch_size / (time.perf_counter() - began)


# Pillow alone


def image_files(source: Source) -> list[str]:
    """The first files of a folder of images in the order in which the pipeline reads them.

    They are as many as a measurement may read; other sources have none.
    """
    if not isinstance(source.records, ImageFolder):
        return []
    order = epoch_order(SEED, 0, len(source))[:10_000]
    return [str(source.records.path / source.records.files[i]) for i in order]


def spawned(workers: int) -> Executor:
    """A pool of processes that hold nothing but this file's imports."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def pillow_rate(
    files: list[str], size: int, crop: str, pool: Callable[[int], Executor], seconds: float
) -> float:
    """Images a second that all cores together decode and crop with Pillow, and drop."""
    with pool(CORES) as workers:
        list(workers.map(pillow_crops, [(files[:2], size, crop, 0.0)] * CORES))
        shares = [files[k::CORES] or files for k in range(CORES)]
        began = time.perf_counter()
        counts = workers.map(pillow_crops, [(share, size, crop, seconds) for share in shares])
        return sum(counts) / (time.perf_counter() - began)


def pillow_crops(task: tuple[list[str], int, str, float]) -> int:
    """Decodes and crops files one after the other for some seconds; returns how many.

    Args:
      task: (files, size of the crops, "center" or "random", seconds).
    """
    files, size, crop, seconds = task
    rng = np.random.default_rng(SEED) if crop == "random" else None
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        pillow_crop(files[count % len(files)], size, rng)
        count += 1
    return count


def pillow_crop(file: str, size: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """ADM's crop of a file in plain Pillow, uint8: random with a generator, central without."""
    with Image.open(file) as picture:
        picture = picture.convert("RGB")
    shorter = size if rng is None else int(rng.integers(size, math.ceil(size / 0.8) + 1))
    while min(picture.size) >= 2 * shorter:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    if rng is not None:
        top, left = (int(rng.integers(side - size + 1)) for side in (height, width))
    return np.asarray(picture.crop((left, top, left + size, top + size)))


# Time by stage


def stages(source: Source, size: int | None, count: int = 256) -> dict[str, float]:
    """The seconds that one thread takes for each stage of an example."""
    indices = np.random.default_rng(0).integers(len(source), size=count)
    if hasattr(source.records, "read_posteriors"):
        reading = best(lambda: source.records.read_posteriors(indices)) / count
        blocks = itertools.count()
        stream = ExampleStream(source, seed=SEED, flip=True)
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
    whole = ExampleStream(data.arrays(np.stack(cropped)), seed=SEED, flip=True)
    found["batching"] = best(lambda: whole.block(0, len(cropped))) / len(cropped)
    return found


def best(function: Callable[[], Any], times: int = 5) -> float:
    """The seconds of the fastest of a few calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken)


def noise_seconds() -> float:
    """The seconds a thread takes to draw one latent's 4,096 normal numbers.

    The pipeline does not draw them; the training step does.
    """
    rng, out = np.random.Generator(np.random.Philox(0)), np.empty(4096, np.float32)
    return best(lambda: [rng.standard_normal(out=out, dtype=np.float32) for _ in range(100)]) / 100


# The rate that a model needs


def needed_rate(arguments: argparse.Namespace) -> tuple[float, str]:
    """The examples a second that the model needs from one process, and the reason in words."""
    shared = f", shared by {arguments.processes} processes" if arguments.processes > 1 else ""
    if arguments.images_per_second:
        rate = arguments.images_per_second
        return rate / arguments.processes, f"--images_per_second {rate:g}{shared}"
    peak = peak_flops(arguments.device, "bfloat16")
    if peak is None:
        raise ValueError(
            f"--device {arguments.device!r}: its peak is not known; give --images_per_second"
        )
    config = default_config()
    config.model.name = arguments.model
    apply_recipe(config)
    model = create_model(arguments.model)
    work = flops.train_step_flops(model, 1, model.kept_tokens(**config.masking).mean)
    rate = arguments.mfu * peak * arguments.num_devices / work
    devices = f"{arguments.num_devices} x {arguments.device} at {arguments.mfu:.0%} MFU"
    return rate / arguments.processes, f"{arguments.model} on {devices}{shared}"


# Data to measure with


def synthetic_jpegs(folder: Path, count: int) -> Source:
    """A folder of JPEGs of two classes: parts of scikit-learn's photographs, slightly enlarged."""
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
    """A cache of random posteriors of images and mirror images, in ImageNet's shape."""
    description = latent_cache.CacheDescription(
        source="random numbers", num_images=count, class_names=tuple(map(str, range(1000))),
        image_size=256, vae="none", vae_digest="", scale=STABLE_DIFFUSION_SCALE,
        compute_dtype="float32", latent_shape=(32, 32, 4), dtype="float16", mirror=True,
        images_per_shard=256,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    latent_writing.begin_cache(folder, description)

    def records(images: range) -> Iterator[np.ndarray]:
        rows = np.zeros((len(images), 2), description.record_type)
        rows["index"] = np.array(images)[:, None]
        rows["label"], rows["mirrored"][:, 1] = rows["index"] % 1000, 1
        rows["posterior"] = rng.standard_normal(rows["posterior"].shape, np.float32)
        yield rows.reshape(-1)

    for shard in range(description.num_shards):
        images = description.shard_images(shard)
        latent_writing.write_shard(folder, description, shard, records(images))
    latent_writing.finish_cache(folder, description)
    return create_source(ml_collections.ConfigDict({"name": "latents", "path": str(folder)}))


# The command


def rates_table(kind: str, result: dict[str, Any], needed: float, why: str) -> str:
    """A source's measurement as text.

    Args:
      kind: "images" or "latents".
      result: the result of `profile`.
      needed: examples a second that the model needs.
      why: the reason in words.
    """
    rates, parts = result["examples_per_second"], result["microseconds_by_stage"]
    of_pillow = result.get("of_pillow", {})
    lines = [f"{result['source']}", f"{'':32}{f'{kind}/s':>12}{'µs each':>12}"]
    lines[-1] += f"{'of Pillow':>12}" if of_pillow else ""
    for name, rate in rates.items():
        part = f"{of_pillow[name]:12.0%}" if name in of_pillow else ""
        lines.append(f"{name:32}{rate:12,.0f}{1e6 / rate:12,.1f}{part}")
    lines.append(f"{'the model needs':32}{needed:12,.0f}{1e6 / needed:12,.1f}  ({why})")
    lines.append(
        "one thread's time               "
        + ", ".join(f"{name} {part:,.1f} µs" for name, part in parts.items())
    )
    ours = max(rate for name, rate in rates.items() if not name.startswith(ALONE))
    slowest = max(parts, key=parts.get)
    enough = "the pipeline keeps up" if ours >= needed else "the model waits for the pipeline"
    lines.append(
        f"{enough} ({ours / needed:.1f} times what is needed); {slowest} takes "
        f"{parts[slowest] / sum(parts.values()):.0%} of the work"
    )
    return "\n".join(lines)


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuses, with ValueError, flags with which nothing can be measured."""
    if arguments.crop not in CROPS:
        raise ValueError(f"--crop is {arguments.crop!r}; known are {', '.join(map(repr, CROPS))}")


def measure(arguments: argparse.Namespace) -> None:
    """Measures what the flags ask for, and prints the tables and all numbers as JSON."""
    jax.config.update("jax_platforms", "cpu")
    results: dict[str, Any] = {"cores": CORES}
    check_flags(arguments)
    results["needed"], results["needed_for"] = needed_rate(arguments)
    if arguments.data_name:
        config = {"name": arguments.data_name, "path": arguments.data_path}
        config |= {"split": arguments.data_split, "labels": arguments.labels}
        config |= {"class_order": arguments.class_order}
        measure_source(create_source(ml_collections.ConfigDict(config)), arguments, results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure_source(synthetic_jpegs(Path(folder) / "jpeg", 256), arguments, results)
            latents = synthetic_latents(Path(folder) / "latents", arguments.examples)
            measure_source(latents, arguments, results)
    print(json.dumps(results))


def measure_source(source: Source, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measures a source, adds the numbers to `results`, and prints them."""
    kind = "latents" if source.latents else "images"
    results[kind] = profile(source, arguments)
    print(rates_table(kind, results[kind], results["needed"], results["needed_for"]))
    if source.latents:
        noise = noise_seconds()
        results["noise_microseconds"] = 1e6 * noise
        print(f"(not in it: a latent's noise, {1e6 * noise:,.1f} µs, which the devices draw)")
    print(flush=True)
