"""Ten test images and their experts."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register

SAMPLES = 10


@register("samples", "The first test images, with their experts and gate weights.", place=70)
def samples(evaluated: Evaluated) -> Figure:
    test, predictions = evaluated.test, evaluated.predictions
    count = min(SAMPLES, len(test))
    sample_A, expert_A, _, weight_A = predictions.tally()
    experts = []
    for sample in range(count):
        mine_A = sample_A == sample
        # Inside the ViT an image's weights are sums over tokens and blocks: shown as shares.
        total = weight_A[mine_A].sum() if predictions.blocks else 1.0
        pairs = sorted(zip(weight_A[mine_A] / total, expert_A[mine_A], strict=True), reverse=True)
        experts.append([(str(expert), float(weight)) for weight, expert in pairs])
    return plots.samples(
        test.images_NCHW[:count].permute(0, 2, 3, 1).numpy(),
        [test.class_names[label] for label in predictions.labels_N[:count]],
        [test.class_names[label] for label in predictions.predicted_N[:count]],
        experts,
    )
