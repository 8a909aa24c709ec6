"""Distil a frozen ViT-B/16 into `model/vit_micro.py`, without labels, from the CIFAR-100 training images.

    python -m distillation.train_vit_micro --data DIR --teacher FILE --out OUT

Run it at the top of the repository. DIR contains `cifar-100-python/`; FILE is a safetensors state dict of the timm
model `vit_base_patch16_clip_quickgelu_224.openai` with num_classes=0. Made for one large GPU: the bank of
views takes up to 17 GB of its memory, the whole run about `--deadline` seconds. `--seed 0` is the default.

1. The teacher processes random views of the training images for `--teacher_seconds`: its class token and mean
   patch token after several blocks, standardised and reduced to damped principal components, are the targets
   (teacher.py, views.py).
2. The student learns to predict them from the same views, for `--student_seconds`, with a linear head that is
   discarded afterwards (student.py).
3. Labels are used only at the end: logistic regression and kNN on the frozen features of the test set (probe.py), for
   the trained and the untrained student, and for the teacher's targets.

OUT gets `vit_micro.safetensors` (float16), `vit_micro.json` (scores, settings, versions, SHA-256), and
`vit_micro_half.safetensors` from the middle of training. Paste the printed sha256 into model/vit_micro.py.
The number of views and steps depends on the machine; `--views V --teacher_seconds 1e9 --steps S`, with V and S
from the JSON, repeats a run on another machine.

Result: seed 0, 494 s on one NVIDIA H200 (torch 2.11, timm 1.0.29), 33 views, 16,219 steps. Frozen features (class
token and mean patch token of the last block), CIFAR-100 test: logistic regression 74.94 % accuracy, 75.03 %
macro-F1; kNN (k = 20) 72.53 %. Untrained: 17.23 % and 10.57 %. The teacher's own targets of its last block: 82.46 %.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from common.arguments import path_option
from distillation.probe import probe
from distillation.student import Distiller, Schedule, State, train_student
from distillation.teacher import Bank, Teacher, default_blocks, fill_bank, load_teacher
from distillation.views import to_model_input
from model.vit_micro import IMAGE_SIZE, MEAN, STD, vit_micro

# Upper limit for probing at the end, in seconds; training stops this long before --deadline.
PROBE_SECONDS = 45


class Clock:
    """Seconds since the start, and lines that show them."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        print(f"[{self.elapsed():6.1f} s] {text}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil a ViT-B/16 into vit_micro on CIFAR-100, without labels.")
    add = parser.add_argument
    add("--data", type=path_option, required=True, help="folder that contains cifar-100-python/")
    add("--teacher", type=path_option, help="safetensors file of the teacher's weights")
    add("--teacher_random", action="store_true", help="a teacher with random weights, to test the script")
    add("--teacher_name", default="vit_base_patch16_clip_quickgelu_224.openai", help="timm model")
    add("--teacher_blocks", type=int, nargs="+", help="0-based, ascending (default: 7 9 10 11 of 12)")
    add("--out", type=path_option, required=True, help="folder for the results")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--deadline", type=float, default=525, help="time limit for everything in seconds")
    add("--teacher_seconds", type=float, default=180, help="seconds for compiling and running the teacher")
    add("--student_seconds", type=float, default=300, help="seconds for compiling and training the student")
    add("--steps", type=int, default=0, help="exact number of training steps instead of --student_seconds")
    add("--views", type=int, default=48, help="maximum number of views of each image in the bank")
    add("--teacher_batch", type=int, default=1000)
    add("--components", type=int, default=256, help="principal components kept of each target")
    add("--whiten", type=float, default=0.5, help="0: keep the components' variances, 1: make them equal")
    add("--batch", type=int, default=1024)
    add("--lr", type=float, default=2e-3)
    add("--weight_decay", type=float, default=0.05)
    add("--drop_path", type=float, default=0.05)
    add("--relation", type=float, default=0.5, help="weight of the neighbourhood loss")
    add("--anchors", type=int, default=1024, help="landmark images of the neighbourhood loss")
    add("--limit", type=int, help="use only this many images of each split")
    add("--no_compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args(argv)
    if args.views < 2:
        parser.error("--views must be at least 2: the clean view and a random one")
    if not args.teacher_random and (args.teacher is None or not args.teacher.is_file()):
        parser.error(f"--teacher: no such file: {args.teacher}")
    return args


def load_split(root: Path, train: bool, limit: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """A CIFAR-100 split on the device: images_NCHW uint8, labels_N int64."""
    split = torchvision.datasets.CIFAR100(str(root), train=train, download=False)
    images_NCHW = torch.from_numpy(split.data[:limit]).permute(0, 3, 1, 2).contiguous()
    return images_NCHW.to(device), torch.tensor(split.targets[:limit], device=device)


def to_half(state: State) -> State:
    """Every tensor as contiguous float16 on the CPU, as stored in the file."""
    return {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in state.items()}


def save_weights(state: State, path: Path) -> str:
    """Write the float16 state dict atomically; returns the file's SHA-256."""
    temporary = path.with_suffix(".tmp")
    save_file(to_half(state), temporary)
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    os.replace(temporary, path)
    return digest


@torch.no_grad()
def student_features(state: State, images_NCHW: Tensor) -> dict[str, Tensor]:
    """Features of the float16-rounded weights, computed in float32.

    "last": class token and mean patch token, (N, 384). "multi": these and the class tokens after blocks 4, 5
    and 6, each after the final norm, (N, 960).
    """
    device = images_NCHW.device
    model = vit_micro()
    model.load_state_dict({name: tensor.float() for name, tensor in to_half(state).items()}, strict=True)
    model.eval().to(device)
    mean_C, std_C = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    depth = len(model.blocks)
    last, multi = [], []
    for part_BCHW in images_NCHW.split(1000):
        levels = model.forward_intermediates(
            to_model_input(part_BCHW, IMAGE_SIZE, mean_C, std_C),
            indices=list(range(depth - 4, depth)),
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches_BTD, prefix_BPD = levels[-1]
        last.append(torch.cat([prefix_BPD[:, 0], patches_BTD.mean(1)], dim=1))
        multi.append(torch.cat([last[-1], *(prefix[:, 0] for _, prefix in levels[:-1])], dim=1))
    return {"last": torch.cat(last), "multi": torch.cat(multi)}


def make_bank(args: argparse.Namespace, images_NCHW: Tensor, clock: Clock) -> tuple[Teacher, Bank, list[int]]:
    """The teacher, the bank of its views and targets, and the used teacher blocks."""
    end = clock.elapsed() + args.teacher_seconds
    weights = None if args.teacher_random else args.teacher
    model = load_teacher(args.teacher_name, weights, images_NCHW.device)
    blocks = sorted(args.teacher_blocks or default_blocks(len(model.blocks)))
    teacher = Teacher(model, blocks, min(args.teacher_batch, len(images_NCHW)), not args.no_compile, clock.say)
    clock.say(f"teacher {args.teacher_name} ready, blocks {blocks}")
    raw_NSD = teacher.raw(images_NCHW)
    clock.say(f"teacher has processed the clean images: {tuple(raw_NSD.shape)}")
    teacher.fit(raw_NSD, args.components, args.whiten, clock.say)
    bank = fill_bank(teacher, images_NCHW, raw_NSD, args.views, args.seed + 1, lambda: end - clock.elapsed(), clock.say)
    clock.say(f"bank: {len(bank.images_VNCHW)} views of {len(images_NCHW)} images")
    return teacher, bank, blocks


def score_all(
    args: argparse.Namespace,
    teacher: Teacher,
    clean_NSK: Tensor,
    states: dict[str, State],
    train: tuple[Tensor, Tensor],
    clock: Clock,
) -> dict[str, dict[str, float]]:
    """Probe scores of the teacher's targets (last block) and of each student state, on the test set."""
    train_NCHW, train_N = train
    test_MCHW, test_M = load_split(args.data, False, args.limit, train_NCHW.device)
    # the teacher first: a new matmul precision would make torch.compile compile it again
    test_MSK = teacher.project(teacher.raw(test_MCHW))
    torch.set_float32_matmul_precision("highest")
    scores = {}
    for name, state in reversed(states.items()):
        train_features, test_features = (student_features(state, x) for x in (train_NCHW, test_MCHW))
        for variant, train_ND in train_features.items():
            scores[f"{name}, {variant}"] = probe(train_ND, train_N, test_features[variant], test_M, args.seed)
            clock.say(f"probed: {name}, {variant}: {scores[f'{name}, {variant}']['logistic_accuracy']:.2f}")
    targets = (clean_NSK[:, -2:].flatten(1), test_MSK[:, -2:].flatten(1))
    scores["teacher's targets, last"] = probe(targets[0], train_N, targets[1], test_M, args.seed)
    return scores


def print_table(scores: dict[str, dict[str, float]]) -> None:
    title = "CIFAR-100 test, %"
    print(f"\n{title:<26} {'features':>8} {'logistic':>9} {'F1':>6} {'kNN k=20':>9} {'F1':>6}")
    for name, row in scores.items():
        print(
            f"{name:<26} {row['features']:>8}"
            f" {row['logistic_accuracy']:>9.2f} {row['logistic_macro_f1']:>6.2f}"
            f" {row['knn_accuracy']:>9.2f} {row['knn_macro_f1']:>6.2f}"
        )
    print(flush=True)


def write_json(path: Path, record: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    args, clock = parse(argv), Clock()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    train = load_split(args.data, True, args.limit, device)
    teacher, bank, blocks = make_bank(args, train[0], clock)

    seconds = min(args.student_seconds, args.deadline - PROBE_SECONDS - clock.elapsed())
    schedule = Schedule(max(seconds, 0), args.steps, args.batch, args.lr, args.weight_decay)
    student = vit_micro(args.drop_path)
    untrained = to_half(student.state_dict())
    distiller = Distiller(student, bank, args.relation, args.anchors, args.seed).to(device)

    def save_half(state: State) -> None:
        digest = save_weights(state, args.out / "vit_micro_half.safetensors")
        clock.say(f"saved the middle of training, sha256 {digest}")

    state, steps = train_student(distiller, bank, schedule, args.seed + 2, not args.no_compile, save_half, clock.say)
    path = args.out / "vit_micro.safetensors"
    record = {
        "sha256": save_weights(state, path),
        "bytes": path.stat().st_size,
        "steps": steps,
        "views": len(bank.images_VNCHW),
        "teacher_blocks": blocks,
        "settings": {
            name: value
            for name, value in (vars(args) | vars(schedule)).items()
            if not isinstance(value, Path) and name != "teacher_blocks"
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        },
        "seconds_without_probes": clock.elapsed(),
    }
    # also before the probes: if these are interrupted, the weights still have their record
    write_json(args.out / "vit_micro.json", record)
    clock.say(f"saved {path}, sha256 {record['sha256']}")
    clean_NSK = bank.targets_VNSK[0].clone()
    del bank, distiller
    scores = score_all(args, teacher, clean_NSK, {"untrained": untrained, "distilled": state}, train, clock)
    write_json(args.out / "vit_micro.json", record | {"scores": scores, "seconds": clock.elapsed()})
    print_table(scores)
    clock.say(f"done; WEIGHTS_SHA256 = {record['sha256']!r}")


if __name__ == "__main__":
    main()
