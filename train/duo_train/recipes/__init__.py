"""Ways to find the retrieval heads, one small file each: all end in a gate for every KV head."""

from duo_train.recipes.attention_profile import AttentionProfile
from duo_train.recipes.base import Recipe
from duo_train.recipes.distill import Distill
from duo_train.recipes.kvzip import KVzip
from duo_train.recipes.learned import Learned
from duo_train.recipes.prulong import PruLong
from duo_train.run import Run

# By the name that `duo identify --recipe` takes; the settings of each are flags, --NAME.FIELD.
RECIPES: dict[str, type[Recipe]] = {
    "distill": Distill,
    "prulong": PruLong,
    "attention-profile": AttentionProfile,
    "kvzip": KVzip,
}

__all__ = ["RECIPES", "AttentionProfile", "Distill", "KVzip", "Learned", "PruLong", "Recipe", "Run"]
