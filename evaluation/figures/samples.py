"""Ten test images, and who saw them."""

from matplotlib.figure import Figure

from analysis import plots
from evaluation.figures.registry import Evaluated, register

SAMPLES = 10


@register("samples", "The first test images, with the experts that saw them and the gate's weights.", place=70)
def samples(evaluated: Evaluated) -> Figure:
    test, predictions = evaluated.test, evaluated.predictions
    count = min(SAMPLES, len(test))
    experts = []
    for sample in range(count):
        mine_A = predictions.sample_A == sample
        pairs = sorted(zip(predictions.weight_A[mine_A], predictions.expert_A[mine_A], strict=True), reverse=True)
        experts.append([(str(expert), float(weight)) for weight, expert in pairs])
    return plots.samples(
        test.images_NCHW[:count].permute(0, 2, 3, 1).numpy(),
        [test.class_names[label] for label in predictions.labels_N[:count]],
        [test.class_names[label] for label in predictions.predicted_N[:count]],
        experts,
    )
