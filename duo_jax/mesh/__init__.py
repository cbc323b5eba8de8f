"""Several devices and processes: meshes, the balance of heads over them, and the placement of weights."""
