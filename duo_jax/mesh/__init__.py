"""Several devices and processes: meshes, the balance of heads, placement of weights."""
