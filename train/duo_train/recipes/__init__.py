"""Ways to find the retrieval heads, one small file each: all end in a gate for every KV head."""

from duo_train.recipes.attention_profile import AttentionProfile
from duo_train.recipes.base import Recipe, Run
from duo_train.recipes.distill import Distill
from duo_train.recipes.kvzip import KVzip
from duo_train.recipes.learned import Learned
from duo_train.recipes.prulong import PruLong

__all__ = ["AttentionProfile", "Distill", "KVzip", "Learned", "PruLong", "Recipe", "Run"]
