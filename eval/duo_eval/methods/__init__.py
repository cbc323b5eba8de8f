"""Ways to hold a context: full attention, DuoAttention, and the methods it is compared with."""
