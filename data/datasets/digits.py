"""scikit-learn's handwritten digits, which come with the package."""

import numpy as np
import torch

from common.imports import lazy_imports
from data.image_set import ImageSet
from data.registry import Parts, register


@register("digits", about="scikit-learn's 1,797 handwritten digits, 8 x 8, in grey", side=8, grey=True, published=True)
def load(config) -> Parts:
    """All images, without an official split."""
    return load_digits(), None, None


def load_digits() -> ImageSet:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 grey values 0..16, as uint8 RGB."""
    with lazy_imports():
        from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey_NHW = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    return ImageSet(
        images_NCHW=grey_NHW[:, None].repeat(1, 3, 1, 1),
        labels_N=torch.from_numpy(digits.target.astype(np.int64)),
        class_names=tuple(str(name) for name in digits.target_names),
    )
