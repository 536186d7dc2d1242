"""`attention_collectives` under the name of its first release; the code is `paged_dist.ops.collectives`."""

from paged_dist.ops.collectives import OUTPUT_HEADS, Collective, attention_collectives

__all__ = ["OUTPUT_HEADS", "Collective", "attention_collectives"]
