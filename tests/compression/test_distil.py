"""Students: their sizes, and impossible ones."""

import pytest
from compression_helpers import behind, inside

from assembly.twin import twin_of
from common.errors import UserError
from compression.distil import dense_student, sparse_student


def test_a_sparse_student_has_half_the_units():
    config, *_ = behind(experts={"sizes": ["small", [5], [1], [8, 6]], "shared": [[7]]})
    student = sparse_student(config, 3, None, warm=False)
    assert student.experts.sizes == [[128, 64], [2], [1], [4, 3]] and student.experts.shared == [[3]]
    assert student.train.epochs == 3 and student.router == config.router
    config, *_ = inside(experts={"head": [[4], [3], [2], [5]]})
    student = sparse_student(config, None, None, warm=False)
    assert student.experts.head == [[2], [1], [1], [2]] and student.train.epochs == config.train.epochs


def test_a_student_that_continues_keeps_its_sizes_and_its_gate():
    config, *_ = behind({"warmup_steps": 9})
    student = sparse_student(config, 2, None, warm=True)
    assert student.experts == config.experts and student.router.warmup_steps == 0 and student.train.epochs == 2


def test_sizes_can_be_named():
    config, *_ = behind(experts={"shared": [[7]]})
    assert sparse_student(config, None, [[2], [3]], warm=False).experts.sizes == [[2], [3]]
    with pytest.raises(UserError, match=r"--distil sparse: router\.top_k is 2 but experts\.sizes names 1"):
        sparse_student(config, None, [[2]], warm=False)


def test_a_dense_student_is_one_part_and_not_a_twin():
    config, *_ = behind(experts={"shared": [[7]]})
    student = dense_student(twin_of(config, (8,), 5), 4, None)
    assert len(student.experts.sizes) == 1 and student.experts.shared == [] and student.router.top_k == 1
    assert (student.dense_twin, student.twin_of, student.train.epochs) == (False, None, 4)
    assert dense_student(twin_of(config, (8,), 5), None, [[3]]).experts.sizes == [[3]]
    with pytest.raises(UserError, match="names 2 experts: a dense student has one"):
        dense_student(twin_of(config, (8,), 5), None, [[3], [4]])


def test_a_dense_student_inside_the_vit_has_one_hidden_layer():
    config, *_ = inside()
    with pytest.raises(UserError, match=r"--distil dense: experts.sizes has \[4, 5\]: an adapter has one hidden layer"):
        dense_student(config, None, [[4, 5]])


def test_copies_of_the_ffn_cannot_be_halved():
    config, *_ = inside(experts={"kind": "ffn", "sizes": [[64]] * 4})
    with pytest.raises(UserError, match="add --prune or --merge for a smaller student"):
        sparse_student(config, None, None, warm=False)
