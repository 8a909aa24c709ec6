"""A backbone without weights, to find mistakes in its options before anything is downloaded."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .backbone import BUNDLED, CANNOT_BUILD, Backbone, BackboneConfig, check_bundled, check_name, check_vit
from .errors import InputError, one_line


class _RealNumbers(TorchFunctionMode):
    """Keeps drop rates on the CPU: older versions of timm compute them as a tensor, and read it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        on_cpu = {"device": "cpu"} if function is torch.linspace else {}
        return function(*args, **(kwargs or {}) | on_cpu)


def feature_shape(backbone: Backbone) -> tuple[int, ...]:
    """The shape of the features of an image."""
    device = next(backbone.parameters()).device
    return tuple(backbone(torch.zeros(1, 3, backbone.image_size, backbone.image_size, device=device)).shape[1:])


def outline(config: BackboneConfig) -> Backbone | None:
    """The configured backbone with the blocks and shapes of the real one, on the meta device if it is large.

    None: it can be built only from real tensors. Raises InputError for an unknown name, a file of weights that does
    not exist, a model that is not a ViT, and for features or an image size that it does not have.
    """
    import timm

    if config.name == BUNDLED:
        from .vit_micro import vit_micro

        check_bundled(config)
        with torch.random.fork_rng(devices=[]):
            vit = vit_micro()
    else:
        check_name(config)
        options: dict[str, Any] = {} if config.image_size is None else {"img_size": config.image_size}
        try:
            with torch.device("meta"), _RealNumbers():  # takes no memory or time
                vit = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
        except (*CANNOT_BUILD, AttributeError, IndexError, OSError):
            return None
        check_vit(vit, config.name)
    backbone = Backbone(vit, config.features)
    try:
        feature_shape(backbone)
    except AssertionError as error:  # of timm, about the size
        raise InputError(
            f"backbone {config.name} cannot process images of {backbone.image_size} pixels "
            f"({one_line(error, 120)}): choose another backbone.image_size or backbone.name"
        ) from error
    except (*CANNOT_BUILD, AttributeError, IndexError):
        return None
    return backbone
