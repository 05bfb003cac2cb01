"""Published learning curves: FID-50K of 256 × 256 ImageNet after so many steps, without guidance.

Every figure is of 50,000 samples by 250 steps of DDPM, an average of rate 0.9999 and batches of
256, against ADM's reference batch. Most models have one point.

Sources:
  DiT: Peebles and Xie 2023, "Scalable Diffusion Models with Transformers",
    https://arxiv.org/abs/2212.09748, tables 4 and 9.
  MDT: Gao et al. 2023, "Masked Diffusion Transformer is a Strong Image Synthesizer", the first
    version of https://arxiv.org/abs/2303.14389.
  MDTv2: its later version, "MDTv2: Masked Diffusion Transformer is a Strong Image Synthesizer".
"""

from __future__ import annotations

import dataclasses

_DIT = "Peebles and Xie 2023, https://arxiv.org/abs/2212.09748"
_MDT = "Gao et al. 2023, https://arxiv.org/abs/2303.14389v1"
_MDT_V2 = "Gao et al. 2024, https://arxiv.org/abs/2303.14389v2"

SAMPLES, BATCH_SIZE, EMA_RATE, SAMPLER, SAMPLING_STEPS = 50_000, 256, 0.9999, "ddpm", 250


@dataclasses.dataclass(frozen=True)
class PublishedCurve:
    """A model's published points.

    Attributes:
      steps: training steps, growing.
      fids: FID-50K at each.
      source: the paper.
    """

    steps: tuple[int, ...]
    fids: tuple[float, ...]
    source: str


CURVES = {
    "DiT-S/2": PublishedCurve((400_000,), (68.40,), _DIT),
    "DiT-B/2": PublishedCurve((400_000,), (43.47,), _DIT),
    "DiT-XL/2": PublishedCurve((400_000, 7_000_000), (19.47, 9.62), _DIT),
    "MDT-S/2": PublishedCurve((300_000,), (57.01,), _MDT),
    "MDT-B/2": PublishedCurve((400_000,), (34.33,), _MDT),
    "MDT-XL/2": PublishedCurve((2_500_000, 3_500_000, 6_500_000), (7.41, 6.46, 6.23), _MDT),
    "MDTv2-S/2": PublishedCurve((400_000,), (39.50,), _MDT_V2),
    "MDTv2-B/2": PublishedCurve((400_000,), (19.55,), _MDT_V2),
    "MDTv2-XL/2": PublishedCurve((400_000,), (7.70,), _MDT_V2),
}
