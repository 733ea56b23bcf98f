"""The loss. `distill_loss` is it, and what it takes and returns; loss/distill.py has the whole picture."""

from prune_opd.loss.distill import distill_loss
from prune_opd.loss.inputs import Head, Method, Tokens
from prune_opd.loss.known_top import KnownTop
from prune_opd.loss.old_policy import OldPolicy
from prune_opd.loss.stats import GateStats

__all__ = ["GateStats", "Head", "KnownTop", "Method", "OldPolicy", "Tokens", "distill_loss"]
