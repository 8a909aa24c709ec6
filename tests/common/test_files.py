"""Whether a folder or file can be created."""

import pytest

from common.errors import EnvironmentFault
from common.files import require_place


def test_a_path_is_tested_and_left_unchanged(tmp_path):
    require_place(tmp_path / "new" / "run", "--out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        EnvironmentFault, match=r"--out .*run cannot be created in .*file: Not a directory; choose another"
    ):
        require_place(tmp_path / "file" / "run", "--out")
