"""The processes of a run: how they start together, and how each sees that another is lost."""

from paged_dist.cluster.exit_codes import DISAGREE, FAILED, LOST, PREEMPTED
from paged_dist.cluster.startup import initialize_distributed
from paged_dist.cluster.watchdog import Disagreement, Watchdog

__all__ = ["DISAGREE", "FAILED", "LOST", "PREEMPTED", "Disagreement", "Watchdog", "initialize_distributed"]
