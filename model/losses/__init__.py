"""Auxiliary losses that keep the experts in use. One file a loss; each registers itself and its weight's option."""

from ..registry import import_all
from .base import LOSSES, BalanceConfig, Loss, register

import_all(__name__, __path__)

__all__ = ["LOSSES", "BalanceConfig", "Loss", "register"]
