"""Knowledge distillation: a loss computed by hand, its gradient, and a student that learns from its teacher alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trainer_helpers import make_trainer

from training.step import TrainingStep
from training.teacher import Teacher


class Fixed(nn.Module):
    """Returns the same logits for every input."""

    def __init__(self, logits_C):
        super().__init__()
        self.logits_C = nn.Parameter(torch.tensor(logits_C))

    def forward(self, inputs):
        return self.logits_C.expand(len(inputs), -1), ()


def test_the_loss_by_hand():
    """Temperature 2: the teacher's logits (2 ln 3, 0) are 3/4 and 1/4; the student's zeros are halves."""
    teacher = Teacher([Fixed([2 * math.log(3), 0.0])], temperature=2.0, weight=0.6)
    targets_BC = teacher.targets(torch.zeros(1, 1))
    assert targets_BC.tolist() == [pytest.approx([0.75, 0.25])]
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = teacher.loss(targets_BC, torch.zeros(1, 2), torch.tensor([1]), 0.0)
    assert loss.item() == pytest.approx(0.6 * 4 * divergence + 0.4 * math.log(2))


def test_an_ensemble_is_the_mean_of_its_probabilities():
    teacher = Teacher([Fixed([math.log(3), 0.0]), Fixed([0.0, 0.0])], temperature=1.0, weight=1.0)
    assert teacher.targets(torch.zeros(2, 1)).tolist() == [pytest.approx([0.625, 0.375])] * 2
    logits_BC = torch.tensor([[0.3, -0.2], [1.0, 2.0]], requires_grad=True)
    teacher.loss(teacher.targets(torch.zeros(2, 1)), logits_BC, torch.tensor([0, 1]), 0.0).backward()
    expected = (logits_BC.softmax(dim=1) - torch.tensor([0.625, 0.375])).detach() / 2  # of the mean over two samples
    torch.testing.assert_close(logits_BC.grad, expected)
    assert all(not p.requires_grad for model in teacher.models for p in model.parameters())


def test_without_a_teacher_the_loss_uses_only_the_labels():
    teacher, labels_B = Teacher([Fixed([5.0, 1.0, 0.0])], 3.0, weight=0.0), torch.tensor([0, 2])
    logits_BC = torch.randn(2, 3)
    loss = teacher.loss(teacher.targets(logits_BC), logits_BC, labels_B, 0.1)
    torch.testing.assert_close(loss, F.cross_entropy(logits_BC, labels_B, label_smoothing=0.1))


def test_a_student_learns_from_its_teacher_without_labels(tmp_path, splits):
    """The teacher predicts class three for every image: after some epochs so does its student, against the labels."""
    trainer = make_trainer(tmp_path / "run", splits, epochs=3)
    logits = [0.0] * 10
    logits[3] = 8.0
    step = trainer.train_step
    assert isinstance(step, TrainingStep)
    step.teacher = Teacher([Fixed(logits)], temperature=1.0, weight=1.0)
    trainer.fit()
    inputs, _ = next(iter(trainer.bank.batches("validation", 64)))
    with torch.no_grad():
        answers_B = trainer.model.eval()(inputs)[0].argmax(dim=1)
    assert (answers_B == 3).float().mean() > 0.95
