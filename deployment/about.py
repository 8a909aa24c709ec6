"""The metadata of an exported file: labels, preprocessing, outputs, and an example program."""

from typing import Any

from common.environment import versions
from evaluation.trained import TrainedRun
from model.moe_vit import MoEViT

OPEN = {
    ".onnx": """\
session = onnxruntime.InferenceSession("{name}")
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])""",
    ".pt2": """\
model = torch.export.load("{name}", extra_files=(about := {{"metadata.json": ""}})).module()
labels = json.loads(about["metadata.json"])["labels"]""",
}
ANSWER = {
    ".onnx": 'session.run(None, {"images": images})',
    ".pt2": "model(torch.from_numpy(images))",
}
PACKAGE = {".onnx": "onnxruntime", ".pt2": "torch"}
EXAMPLE = """\
import json, numpy, {package}
from PIL import Image, ImageOps
{open}
image = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
x, y = ((length - min(image.size)) // 2 for length in image.size)
square = image.crop((x, y, x + min(image.size), y + min(image.size))).resize(({side}, {side}), Image.Resampling.BICUBIC)
images = numpy.array(square{grey}).transpose(2, 0, 1)[None]  # uint8, (batch, 3, {side}, {side})
probabilities, experts, weights = {answer}
best = int(probabilities[0].argmax())
print(labels[best], float(probabilities[0, best]), experts[0].tolist(), weights[0].tolist())
"""


def about(trained: TrainedRun, name: str, ending: str) -> dict[str, Any]:
    """The metadata of a file, as texts and plain values. name: of the file. ending: .onnx or .pt2."""
    config, backbone, side = trained.config, trained.backbone, trained.config.data.side
    return {
        "labels": list(trained.class_names),
        "input": f"images: uint8 (batch, 3, {side}, {side}), RGB{', all three alike' if config.data.grey else ''}",
        "outputs": _outputs(trained),
        "expert_names": config.experts.labels(),
        "preprocessing": {
            "outside": f"the image upright, its centre square, resized to {side} x {side} pixels (bicubic)"
            + (", without colour" if config.data.grey else ""),
            "inside": f"resized to {backbone.image_size} x {backbone.image_size} (bicubic, antialiased), scaled to "
            "[0, 1], normalised by mean and std",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "run": trained.run.path.resolve().name,
        "data": config.data.name,
        "backbone": {"name": config.backbone.name, "fingerprint": backbone.fingerprint()},
        "versions": versions(("torch", "timm", "onnx", "onnxscript")),
        "example": example(name, ending, side, config.data.grey),
    }


def _outputs(trained: TrainedRun) -> dict[str, Any]:
    inside = isinstance(trained.model, MoEViT)
    mean = "; the mean over the image's tokens" if inside and trained.config.router.level == "token" else ""
    shape = "(batch, block, expert)" if inside else "(batch, expert)"
    found = {
        "probabilities": "(batch, class), float32",
        "experts": f"{shape}, int64: index into expert_names, sorted by decreasing weight; -1: none",
        "weights": f"{shape}, float32: the gate weight of each of these experts{mean}",
    }
    return found | ({"blocks": list(trained.model.blocks)} if isinstance(trained.model, MoEViT) else {})


def example(name: str, ending: str, side: int, grey: bool) -> str:
    """Ten lines of Python that classify an image file, with only Pillow, NumPy and the package of the format."""
    return EXAMPLE.format(
        package=PACKAGE[ending],
        open=OPEN[ending].format(name=name),
        side=side,
        grey='.convert("L").convert("RGB")' if grey else "",
        answer=ANSWER[ending],
    )
