from __future__ import annotations

from handrail.methods.base import GrpoSettings, Method


class Grpo(Method[GrpoSettings]):
    """GRPO, the unguided baseline.

    rollout: G samples of each problem.
    guide: nothing.
    credit: (R − mean R) / (std R + 1e-4); exactly zero if all rewards of a group are equal.
    surrogate: min(rA, clip(r, 1 − low, 1 + high)A), r = π/π_old of each token.

    Dr.GRPO: normalize_std = false, loss_normalizer = "constant".
    DAPO: clip_high = 0.28, loss_normalizer = "token", skip_dead_groups = true.
    GSPO: ratio = "sequence", clip_low = 3e-4, clip_high = 4e-4.
    """

    name = "grpo"
    source = "arXiv 2402.03300; Dr.GRPO 2503.20783, DAPO 2503.14476, GSPO 2507.18071"
    status = "published"
