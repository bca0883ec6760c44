"""DD-Ranking's scores: how good a distilled set is once soft labels and augmentations are accounted for.

Li et al. 2025, "DD-Ranking: Rethinking the Evaluation of Dataset Distillation". Accuracies are fractions in [0, 1], as the
scores are not linear in them: an accuracy in percent is rejected. All scores are for one IPC, architecture and data set.
"""

import math


def hard_label_recovery(real_hard: float, synthetic_hard: float) -> float:
    """Return HLR, what is lost against the full real set with hard labels; lower is better, in [-1, 1].

    Args:
        real_hard: Accuracy of a student trained on the full real set with hard labels.
        synthetic_hard: Accuracy of one trained on the distilled images with hard labels.

    Raises:
        ValueError: An accuracy is not in [0, 1].
    """
    _check(real_hard=real_hard, synthetic_hard=synthetic_hard)
    return real_hard - synthetic_hard


def improvement_over_random(synthetic: float, random: float) -> float:
    """Return IOR, what is gained over as many random real images under the same kind of label; in [-1, 1].

    Args:
        synthetic: Accuracy of a student trained on the distilled images with the method's own kind of label.
        random: Accuracy of one trained on random real images with that kind of label.

    Raises:
        ValueError: An accuracy is not in [0, 1].
    """
    _check(synthetic=synthetic, random=random)
    return synthetic - random


def label_robust_score(
    *, real_hard: float, synthetic_hard: float, synthetic: float, random: float, weight: float = 0.5
) -> float:
    """Return LRS in [0, 1], higher is better; a method without loss and gain has 0.2689.

    LRS is (exp(a) - exp(-1)) / (exp(1) - exp(-1)) with a = weight IOR - (1 - weight) HLR.

    Args:
        real_hard: See :func:`hard_label_recovery`.
        synthetic_hard: See :func:`hard_label_recovery`.
        synthetic: See :func:`improvement_over_random`.
        random: See :func:`improvement_over_random`.
        weight: Weight of the improvement over random; DD-Ranking has one half.

    Raises:
        ValueError: An accuracy or the weight is not in [0, 1].
    """
    _check(weight=weight)
    recovery = hard_label_recovery(real_hard, synthetic_hard)
    return _score(weight * improvement_over_random(synthetic, random) - (1 - weight) * recovery)


def augmentation_robust_score(
    *,
    synthetic_augmented: float,
    random_augmented: float,
    synthetic_plain: float,
    random_plain: float,
    weight: float = 0.5,
) -> float:
    """Return ARS in [0, 1], higher is better; a method no better than random images has 0.2689.

    ARS is (exp(b) - exp(-1)) / (exp(1) - exp(-1)), where b weights the improvement over random images with the method's
    augmentation by ``weight`` and the improvement without any by 1 - ``weight``.

    Args:
        synthetic_augmented: Accuracy on the distilled images with augmentation.
        random_augmented: Accuracy on random real images with the same augmentation.
        synthetic_plain: Accuracy on the distilled images without augmentation.
        random_plain: Accuracy on random real images without augmentation.
        weight: Weight of the augmented pair; DD-Ranking has one half.

    Raises:
        ValueError: An accuracy or the weight is not in [0, 1].
    """
    _check(weight=weight)
    augmented = improvement_over_random(synthetic_augmented, random_augmented)
    return _score(weight * augmented + (1 - weight) * improvement_over_random(synthetic_plain, random_plain))


def _score(gain: float) -> float:
    """Map a gain in [-1, 1] to [0, 1]."""
    return (math.exp(gain) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def _check(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value <= 1:  # also rejects nan
            raise ValueError(f"{name} must be a fraction in [0, 1], not {value}")
