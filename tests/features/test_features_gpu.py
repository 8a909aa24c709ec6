"""On a GPU: features that do not fit go to host memory."""

import pytest
import torch
from feature_helpers import SPLITS

from config.features import FeaturesConfig
from data.augment import AugmentConfig
from features.bank import FeatureBank

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NUMBERS = 2**20  # of an image: a view of 40 takes 84 MB


@pytest.fixture
def room():
    """Limit this process to this number of bytes more than it uses now."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    yield lambda size: torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [60_000_000, 110_000_000])  # for no view; for one, and not for a batch beside it
def test_a_full_gpu_moves_features_to_host_memory_with_a_message(room, capsys, size):
    device = torch.device("cuda", 0)

    def extract(images_BCHW):
        return images_BCHW.flatten(1)[:, :1].float().expand(-1, NUMBERS).contiguous()

    config = FeaturesConfig(views=1, batch_size=4, cache_dir=None)
    bank = FeatureBank(SPLITS, extract, AugmentConfig(flip=False, crop=0), config, device)
    room(size)
    firsts = [features[:, 0].cpu() for features, _ in bank.batches("train", 8)]
    assert torch.cat(firsts).tolist() == list(range(40))
    assert "out of memory: the rest goes to host memory" in capsys.readouterr().out
    assert bank._stored[("train", None)].device is None
