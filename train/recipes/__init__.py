"""Ways to find the retrieval heads, one small file each: all end in a gate for every KV head."""

from train.recipes.attention_profile import AttentionProfile
from train.recipes.base import Recipe, Run
from train.recipes.distill import Distill
from train.recipes.kvzip import KVzip
from train.recipes.learned import Learned
from train.recipes.prulong import PruLong

__all__ = ["AttentionProfile", "Distill", "KVzip", "Learned", "PruLong", "Recipe", "Run"]
