"""Auxiliary losses. Each is one file that registers the loss and the option for its weight."""

from ..registry import import_all
from .base import LOSSES, BalanceConfig, Loss, register

import_all(__name__, __path__)

__all__ = ["LOSSES", "BalanceConfig", "Loss", "register"]
