"""`python -m duo_eval.gpu_suite --out DIR`: are the kernels right on this GPU, and how fast? One file a section.

Sections come in the order of what matters most; each case is written as it ends, and a second call goes on from there.
"""
