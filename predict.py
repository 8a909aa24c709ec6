"""Classify your own images with a trained run: print the most likely classes and the chosen experts.

python predict.py runs/cifar100-20260101-120000 cat.jpg holiday/
python predict.py RUN cat.jpg --json                        one JSON document instead of text
python predict.py RUN holiday/ --reject 0.05                mark images that are unlike the training images
python predict.py RUN cat.jpg dog.png --explain out.png     a figure of images, classes and experts
python predict.py RUN --serve                               a local web page to drop images on
"""

from common.errors import begin_program

if __name__ == "__main__":
    begin_program()

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from analysis.blocks import evenly_spaced
from assembly.loading import load_trained, offload_line
from assembly.unlike import frozen_features, load_unlike
from common.distributed import require_alone
from common.errors import EnvironmentFault, UserError, exit_code_of, exit_process, say
from common.files import write_atomically
from common.plugins import load_plugins
from common.signals import stoppable
from common.text import as_json, is_unicode, printable
from data.image_file import Picture, read_picture
from data.image_tree import find_images
from evaluation.classify import Answer, classify
from evaluation.page import HOST, Ask, listen, require_gradio, serve
from evaluation.predict_options import EXPLAINED, read_options
from evaluation.trained import TrainedRun
from evaluation.unlike import Unlike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 32  # images per batch
MAPS = 4  # blocks shown in the figure, for experts inside the ViT

parse = partial(read_options, __doc__)


def main() -> None:
    options = parse()
    require_alone("predict.py")
    load_plugins(options.plugins)
    if options.serve:
        return serve_page(options)
    files, failed = gather(options.images)
    if options.explain and options.explain.resolve() in {path.resolve() for path in files}:
        raise UserError(f"--explain {options.explain} is one of the images and would be overwritten: name another file")
    trained = load_trained(options.run, options.device, options.weights, say, options.offload_memory)
    unlike = None if options.reject is None else load_unlike(trained, options.root, say)
    rows, shown = [], []
    for path, picture, answer in answers(trained, files, options.top, failed):
        marked = {} if unlike is None else compared(trained, unlike, picture, options.reject)
        rows.append(entry(path, picture, answer, marked))
        if len(shown) < EXPLAINED:
            shown.append((path, picture, answer))
        if not options.json:
            print(text(path, picture, answer, bool(trained.config.experts.shared), marked), flush=True)
    if options.json:
        print(as_json(document(trained, rows, failed), is_unicode(sys.stdout)))
    if options.explain and shown:
        draw(options.explain, shown, bool(trained.config.experts.shared))
        say(f"drawn in {options.explain}" + (f", the first {EXPLAINED}" if len(rows) > EXPLAINED else ""))
    if trained.traffic is not None:
        say(offload_line(trained.traffic))
    if failed:
        raise EnvironmentFault(f"{len(failed)} of {len(failed) + len(rows)} images could not be read")


def serve_page(options: argparse.Namespace) -> None:
    """Serve the page until a signal. Raises EnvironmentFault without gradio, UserError if the port is in use."""
    require_gradio()
    with listen(options.port) as listening:
        trained = load_trained(options.run, options.device, options.weights, say, options.offload_memory)
        unlike = None if options.reject is None else load_unlike(trained, options.root, say)
        say(f"open http://{HOST}:{listening.getsockname()[1]} in a browser on this machine; press Ctrl-C to stop")
        with stoppable():
            serve(
                listening,
                f"Vision MoE: {printable(options.run)}",
                answerer(trained, options.top, unlike, options.reject),
            )


def answerer(trained: TrainedRun, top: int, unlike: Unlike | None = None, share: float | None = None) -> Ask:
    """The function behind the page: from an image file to its entry in --json and its figure."""

    def ask(file: Path) -> tuple[dict[str, Any], "Figure"]:
        picture = read_picture(file, trained.config.data.side, trained.config.data.grey)
        (answer,) = classify(trained, picture.pixels_CHW[None], top)
        marked = {} if unlike is None or share is None else compared(trained, unlike, picture, share)
        figure = figure_of([(Path(file.name), picture, answer)], bool(trained.config.experts.shared))
        return entry(file, picture, answer, marked), figure

    return ask


def gather(paths: list[Path]) -> tuple[list[Path], list[dict[str, str]]]:
    """The image files of all paths. Folders without images are reported at once.

    Raises UserError if there is no file.
    """
    files, failed = [], []
    for path in paths:
        try:
            files += find_images(path)
        except UserError as error:
            if len(paths) == 1:
                raise
            say(f"error: {error}")
            failed.append({"file": str(path), "reason": str(error)})
    if not files:
        raise UserError("none of the folders contains an image: name files, or folders of images")
    return files, failed


def answers(
    trained: TrainedRun, files: list[Path], top: int, failed: list[dict[str, str]]
) -> Iterator[tuple[Path, Picture, Answer]]:
    """Each readable image with its prediction; an unreadable one is reported at once and added to `failed`."""
    data = trained.config.data
    for start in range(0, len(files), BATCH):
        pictures = []
        for path in files[start : start + BATCH]:
            try:
                pictures.append((path, read_picture(path, data.side, data.grey)))
            except UserError as error:
                say(f"error: {error}")
                failed.append({"file": str(path), "reason": str(error)})
        if pictures:
            images_BCHW = torch.stack([picture.pixels_CHW for _, picture in pictures])
            for (path, picture), answer in zip(pictures, classify(trained, images_BCHW, top), strict=True):
                yield path, picture, answer


def compared(trained: TrainedRun, unlike: Unlike, picture: Picture, share: float) -> dict[str, Any]:
    """How far an image is from the training images, and whether it is rejected."""
    distance = float(unlike.distances(frozen_features(trained, picture.pixels_CHW[None]))[0])
    threshold = unlike.threshold(share)
    return {"rejected": distance > threshold, "distance": distance, "threshold": threshold}


def text(path: Path, picture: Picture, answer: Answer, shared: bool, marked: dict[str, Any] | None = None) -> str:
    """A prediction as lines: file, classes, experts, and the class that each expert predicts alone.

    shared: the run has shared experts, so "alone" means: with the shared experts only. marked: what `compared` found.
    """
    lines = [printable(path) + "".join(f" ({note})" for note in picture.notes)]
    if marked and marked["rejected"]:
        distances = f"distance {marked['distance']:.1f}, above {marked['threshold']:.1f}"
        lines.append(
            f"  REJECTED: unlike the training images ({distances}); the classes below are only the nearest ones"
        )
    lines += [f"{100 * score.probability:7.1f} %  {printable(score.name)}" for score in answer.classes]
    lines += [
        f"  expert {vote.name:<24} weight {vote.weight:.2f}, "
        f"{'with the shared' if shared else 'alone'}: {printable(vote.alone.name)} {100 * vote.alone.probability:.1f} %"
        for vote in answer.experts
    ]
    return "\n".join(lines) + "\n"


def entry(path: Path, picture: Picture, answer: Answer, marked: dict[str, Any]) -> dict[str, Any]:
    """An image's entry in --json. marked: what `compared` found."""
    return {"file": str(path), **answer.to_dict(), "notes": list(picture.notes), **marked}


def document(trained: TrainedRun, rows: list[dict[str, Any]], failed: list[dict[str, str]]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "run": str(trained.run.path),
        "data": trained.config.data.name,
        "backbone": trained.config.backbone.name,
        "images": rows,
        "failed": failed,
    }


def _maps(answer: Answer) -> list[tuple[str, list[list[int]]]]:
    """The patch maps of a few blocks, from the first to the last."""
    chosen = [answer.patches[place] for place in evenly_spaced(len(answer.patches), MAPS)]
    return [(f"block {patches.block}", patches.experts) for patches in chosen]


def draw(path: Path, shown: list[tuple[Path, Picture, Answer]], shared: bool) -> None:
    """Write the figure of --explain. Raises EnvironmentFault if it cannot be written."""
    figure = figure_of(shown, shared)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def figure_of(shown: list[tuple[Path, Picture, Answer]], shared: bool) -> "Figure":
    """The figure of images, their classes and experts. shared: as in `text`."""
    # here, because importing matplotlib takes a second
    from analysis.plots.pictures import explanation
    from evaluation.figures import warn_of_letters

    warn_of_letters(
        [text for name, _, answer in shown for text in (name.name, *(score.name for score in answer.classes))]
    )
    return explanation(
        [picture.pixels_CHW.permute(1, 2, 0).numpy() for _, picture, _ in shown],
        [printable(name.name) for name, _, _ in shown],
        [[(score.name, score.probability) for score in answer.classes] for _, _, answer in shown],
        [
            [(vote.name, vote.weight, vote.alone.name, vote.alone.probability) for vote in answer.experts]
            for _, _, answer in shown
        ],
        shared,
        [_maps(answer) for _, _, answer in shown] if shown[0][2].patches else (),
    )


if __name__ == "__main__":
    exit_process(exit_code_of(main))
