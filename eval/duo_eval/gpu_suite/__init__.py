"""`python -m duo_eval.gpu_suite --out DIR`: are the kernels right on this GPU, and how fast? One file a section.

Each result is stored as its case ends, and a second call continues from there.
"""
