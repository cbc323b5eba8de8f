"""Pallas kernels in the Mosaic flavour: Hopper GPUs (sm_90a), by TMA and wgmma."""
