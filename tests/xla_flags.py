"""How XLA compiles fastest what tests run once; `python tests/xla_flags.py` prints it for `XLA_FLAGS`."""

from importlib.metadata import version

# Most tests compile much and compute little: without LLVM's optimizations they take three quarters of the time.
FLAGS = ["--xla_backend_optimization_level=0"]
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
    # The older emitters of loops take two thirds of that; newer versions do not have them.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

if __name__ == "__main__":
    print(*FLAGS)
