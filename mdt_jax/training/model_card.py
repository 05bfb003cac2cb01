"""The card of a published model: what it is, how it was trained and judged, and its limits.

A card is Markdown with a head in YAML that the Hugging Face hub reads. All that it says comes from
the folder's config.json and the run's metrics.jsonl; what is not known is not said.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mdt_jax.basics.names import printable
from mdt_jax.evaluation.evaluator import EVALUATION_METRICS
from mdt_jax.weights.hub_config import NO_LICENSE
from mdt_jax.weights.hub_folder import SAMPLES

_SHOWN_CLASSES = 20  # whose names are listed
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")
_PAPER = "https://arxiv.org/abs/2303.14389"
_PAPER_OF_DIT = "https://arxiv.org/abs/2212.09748"
_LIMITS = (
    "Complex spatial structure, such as bodies and scenes of many objects, is often wrong.",
    "High-frequency detail, such as hair and fine texture, is often missing.",
    "Sampling is slow: a forward pass of the network for each of some 250 steps; second-order "
    "samplers (`dpm++`, `heun`) need 10 to 25, with other results.",
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """The grid of samples that a card shows.

    Attributes:
      step: training steps behind it; None if not known.
      guidance: the guidance scale it was drawn with; None if not known.
    """

    step: int | None = None
    guidance: float | None = None


def model_card(
    described: Mapping[str, Any],
    *,
    address: str,
    parameters: int,
    dtype: str,
    data: str = "",
    lines: Sequence[Mapping[str, Any]] = (),
    picture: Picture | None = None,
) -> str:
    """The text of README.md.

    Args:
      described: the values of config.json.
      address: what loads the model, such as "hf://OWNER/REPO".
      parameters: how many the network has.
      dtype: the type of the weights, in words.
      data: the training data in a person's words; by their name in the config if empty.
      lines: the lines of the run's metrics.jsonl.
      picture: what `samples.png` beside it shows; None if there is none.
    """
    lines = [line for line in lines if line["step"] <= described["training"]["step"]]
    parts = [
        _head(described, lines, address, data),
        _introduction(described, data, parameters, dtype),
        _pictures(picture),
        _use(described, address),
        _training(described, data),
        _results(lines),
        "## Limits\n\nThe authors of MDT name three:\n\n"
        + "\n".join(f"- {limit}" for limit in _LIMITS)
        + "\n\nEvery picture that the model makes is synthetic: it shows nothing that exists, and "
        "must be labelled so where people could take it for a photograph. It repeats what its "
        "training data show and lack, their biases too, and can come near to single training "
        "pictures.",
        _license(described["license"]),
        f"Masked Diffusion Transformers are by [Gao et al.]({_PAPER}), and DiT by [Peebles and "
        f"Xie]({_PAPER_OF_DIT}). Written by "
        f"`tools/push_to_hub.py` of mdt_jax {described['mdt_jax_version']}; `config.json` has all "
        "settings.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(
    described: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], address: str, data: str
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tags = ["diffusion", "diffusion-transformer", "image-generation", "jax", "flax"]
    tags += [] if _is_dit(described) else ["masked-diffusion-transformer"]
    tags += ["class-conditional"] if described["architecture"]["num_classes"] else []
    about: dict[str, Any] = {}
    if found := _published_fid(lines):
        name = data or _data_name(described) or "training data"
        about["model_name"] = address.rpartition("/")[2]
        about["eval_results"] = [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or "data",
                dataset_name=name,
                metric_type="fid",
                metric_value=round(found["eval_fid"], 4),
                metric_name=f"FID of {int(found.get('eval_samples', 0)):,} samples",
            )
        ]
    card = ModelCardData(
        license=described["license"],
        library_name="mdt_jax",
        pipeline_tag="unconditional-image-generation",
        tags=tags,
        **about,
    )
    return f"---\n{card.to_yaml().strip()}\n---"


def _introduction(described: Mapping[str, Any], data: str, parameters: int, dtype: str) -> str:
    a, latents = described["architecture"], described["latents"]
    classes = a["num_classes"]
    kind = f"{classes:,} classes" if classes else "no classes: it is unconditional"
    name = plain(data) or (f"`{_code(found)}`" if (found := _data_name(described)) else "")
    size = f"{a['input_size']} × {a['input_size']}"
    if latents:
        pixels = a["input_size"] * latents["stride"]
        decoder = f"`{_code(latents['autoencoder'])}`" if latents["autoencoder"] else "its encoder"
        of = f"latents of {size} × {a['in_channels']}"
        of += f", images of {pixels} × {pixels} pixels" if pixels else ""
        of += f" behind the autoencoder {decoder}"
    elif a["in_channels"] in (1, 3):
        of = f"{'colour' if a['in_channels'] == 3 else 'gray'} images of {size} pixels"
    else:
        of = f"latents of {size} × {a['in_channels']}, whose autoencoder is not known"
    title = f"# {described['model']}" + (f" of {name}" if name else "")
    said = (
        f"{title}\n\nA diffusion transformer, {parameters:,} parameters in {dtype}, that makes "
        f"**synthetic** {of}; {kind}. It loads with mdt_jax, in JAX, and its "
        "`model.safetensors` has the names of the authors' PyTorch code."
    )
    names = described["class_names"]
    if names and list(names) != [str(i) for i in range(len(names))]:
        shown = ", ".join(plain(name) for name in names[:_SHOWN_CLASSES])
        said += f"\n\nClasses: {shown}" + (", …" if len(names) > _SHOWN_CLASSES else "") + "."
    return said


def _pictures(picture: Picture | None) -> str:
    if picture is None:
        return ""
    told = [] if picture.step is None else [f"step {picture.step:,}"]
    told += [] if picture.guidance is None else [f"guidance {picture.guidance:g}"]
    told += ["synthetic"]
    return f"![Samples, synthetic]({SAMPLES})\n\n*Samples of the model: {', '.join(told)}.*"


def _use(described: Mapping[str, Any], address: str) -> str:
    latents = described["latents"]
    vae = latents["autoencoder"] if latents else ""
    # Published MDTs are decoded with "ema", whose encoder is that of "mse".
    decoder = f" --vae {'ema' if vae in ('mse', '') else vae}" if latents else ""
    return (
        "## Use\n\n```python\nimport jax\nimport mdt_jax\n\n"
        f'model, params = mdt_jax.load("{address}")\n'
        "samples = mdt_jax.sample(model, params, key=jax.random.key(0))\n```\n\n"
        f"```bash\npython -m mdt_jax.sample --checkpoint {address}{decoder} --num_samples 16 "
        "--output samples\n```"
    )


def _training(described: Mapping[str, Any], data: str) -> str:
    training, process = described["training"], described["process"]
    # A folder that is published again may lack some of these.
    source, settings = training.get("data") or {}, training.get("settings") or {}
    rows = []
    if data:
        rows.append(("data", plain(data)))
    elif source.get("name"):
        split = f", split `{_code(str(source['split']))}`" if "split" in source else ""
        rows.append(("data", f"`{_code(source['name'])}`{split}"))
    if source.get("num_examples"):
        rows.append(("examples", f"{source['num_examples']:,}"))
    if training.get("init_from"):
        rows.append(("started from", f"`{_code(training['init_from'])}`"))
    if training["step"]:
        batch = f" of {settings['batch_size']:,} examples" if "batch_size" in settings else ""
        rows.append(("steps", f"{training['step']:,}{batch}"))
    if training.get("ema_rate"):
        rows.append(("average of the weights", f"EMA {training['ema_rate']}"))
    rows.append(
        (
            "process",
            f"{process['schedule']} schedule of {process['num_timesteps']:,} steps, predicts "
            f"{process['prediction']}, variance {process['variance']}",
        )
    )
    optimizer, schedule = settings.get("optimizer") or {}, settings.get("schedule") or {}
    if {"name", "learning_rate"} <= optimizer.keys():
        rate = f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}"
        rows.append(("optimiser", f"{rate}, {schedule.get('name', 'of an unknown schedule')}"))
    masking = settings.get("masking") or {}
    if not _is_dit(described) and masking.get("masked_pass") and "ratio" in masking:
        low, high = masking["ratio"], masking["ratio"] + masking.get("ratio_span", 0.0)
        shares = f"{low:g}" + (f" to {high:g}" if high > low else "")
        rows.append(("tokens hidden in the masked pass", f"{shares} of them"))
    for key in ("label_dropout", "seed"):
        if key in settings:
            rows.append((key.replace("_", " "), str(settings[key])))
    return "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(
        f"| {name} | {value} |" for name, value in rows
    )


def _results(lines: Sequence[Mapping[str, Any]]) -> str:
    rows, said = [], []
    losses = [line for line in lines if isinstance(line.get("loss"), float)]
    if losses:
        last = losses[-1]
        rows.append(("training loss", f"{last['loss']:.4f}", f"step {last['step']:,}"))
    judged = _judged(lines)
    if judged:
        of = f"{int(judged.get('eval_samples', 0)):,} samples, step {judged['step']:,}"
        for name, text, _ in EVALUATION_METRICS:
            value = judged.get(f"eval_{name}")
            if isinstance(value, int | float):
                is_fid = name == "fid" and not _is_inception(judged)
                rows.append(("Fréchet distance" if is_fid else text, f"{value:.4g}", of))
        said.append(f"Judged by {plain(str(judged.get('evaluator', 'an unnamed network')))}.")
        if not _is_inception(judged):
            said.append(
                "These numbers are of the features of a small classifier of the training images: "
                "they compare runs, and never compare with published FIDs."
            )
    if not rows:
        return ""
    table = "\n".join(f"| {name} | {value} | {of} |" for name, value, of in rows)
    text = f"## Results\n\n| metric | value | of |\n| --- | --- | --- |\n{table}"
    return text + (f"\n\n{' '.join(said)}" if said else "")


def _judged(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return next((line for line in reversed(lines) if "eval_fid" in line), None)


def _is_inception(line: Mapping[str, Any]) -> bool:
    return str(line.get("evaluator", "")).lower().startswith("inception")


def _published_fid(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The last judgement by Inception, whose number may stand beside published ones."""
    line = _judged(lines)
    is_number = line is not None and isinstance(line["eval_fid"], int | float)
    return line if is_number and _is_inception(line) else None


def _is_dit(described: Mapping[str, Any]) -> bool:
    return described["architecture"]["family"] == "DiT"


def _license(license: str) -> str:
    said = "not stated" if license == NO_LICENSE else f"`{license}`"
    return f"## Licence\n\nOf the weights: {said}. The training data have one of their own."


def _data_name(described: Mapping[str, Any]) -> str:
    """The name of the training data, if it says more than how they were read."""
    name = (described["training"].get("data") or {}).get("name", "")
    return "" if name in ("latents", "folder", "npy") else name.removeprefix("tfds:")


def plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", printable(" ".join(text.split())))


def _code(text: str) -> str:
    """A text for between backquotes in a table."""
    return printable(" ".join(text.split())).replace("`", "'").replace("|", "/")
