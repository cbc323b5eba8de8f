"""Makes `linear.safetensors`: small linear maps as other libraries store them, with the values that they read.

Knows nothing of this project's code. It needs torch, which the project does not; in an environment of its own, with
AutoAWQ and AutoGPTQ, which are no longer developed, unpacked and not installed:

    pip install torch transformers safetensors compressed-tensors
    pip download --no-deps autoawq==0.2.9 auto-gptq==0.7.1    # then unpack both into one folder
    python tests/golden/quantized/make.py FOLDER
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

OUT, WIDTH = 20, 64
GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
CASES = {
    "w4a16": ("pack-quantized", GROUPS),
    "w4a16, zeros": ("pack-quantized", GROUPS | {"symmetric": False}),
    "w4a16, channels": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8, channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8, one scale": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8, blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
}


def scales_of(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales from the range of each group; zero points for asymmetric integers."""
    rows, columns = {"tensor": (OUT, WIDTH), "channel": (1, WIDTH), "group": (1, 32), "block": (16, 32)}[args.strategy]
    padded = torch.nn.functional.pad(weight, (0, -WIDTH % columns, 0, -OUT % rows))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    low, high = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
    if args.symmetric:
        most = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
        scale = torch.maximum(-low, high) / most
        return (scale.reshape(1) if args.strategy == "tensor" else scale), None
    scale = (high - low) / (2**args.num_bits - 1)
    return scale, (-(2 ** (args.num_bits - 1)) - low / scale).round().to(torch.int8)


def apart(path: Path, **stubs: dict[str, Any]) -> ModuleType:
    """A module without its package, which would import what is not needed; `stubs` are what it imports of that."""
    for name, values in stubs.items():
        stub = sys.modules[name.replace("__", ".")] = ModuleType(name)
        stub.__dict__.update(values)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_levels(out: int, *, symmetric: bool) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear map whose weights are on a grid of 4 bits with groups of 32, its scales and zeros `[out, groups]`."""
    groups = WIDTH // 32
    scales = (torch.rand(out, groups) / 64 + 1 / 64).half().float()
    zeros = torch.full((out, groups), 8.0) if symmetric else torch.randint(1, 16, (out, groups)).float()
    spread = [x.repeat_interleave(32, dim=1) for x in (scales, zeros)]
    linear = torch.nn.Linear(WIDTH, out, bias=False)
    linear.weight.data = (torch.randint(0, 16, (out, WIDTH)) - spread[1]) * spread[0]
    return linear, scales, zeros


def awq(folder: Path) -> dict[str, torch.Tensor]:
    """AutoAWQ's tensors."""
    packing = apart(next(folder.rglob("awq/utils/packing_utils.py")))
    stubs: dict[str, Any] = {
        "awq": {},
        "awq__utils": {},
        "awq__utils__module": {"try_import": lambda name: (None, "")},
        "awq__utils__utils": {"get_best_device": lambda: "cpu"},
        "awq__utils__packing_utils": vars(packing),
    }
    gemm = apart(next(folder.rglob("awq/modules/linear/gemm.py")), **stubs)
    linear, scales, zeros = random_levels(32, symmetric=False)
    stored = gemm.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    tensors = {name: getattr(stored, name) for name in ("qweight", "qzeros", "scales")}
    return tensors | {"values": packing.dequantize_gemm(*tensors.values(), 4, 32).T}


def gptq(folder: Path, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """AutoGPTQ's tensors; its product with the identity is its values."""
    linears = apart(next(folder.rglob("qlinear/qlinear_cuda_old.py")))
    linear, scales, zeros = random_levels(32, symmetric=symmetric)
    stored = linears.QuantLinear(4, 32, WIDTH, 32, bias=False, weight_dtype=torch.float32)
    stored.pack(linear, scales, zeros, None)
    tensors = {name: getattr(stored, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return tensors | {"values": stored(torch.eye(WIDTH)).T}


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    configs: dict[str, str] = {}
    folder, settings = Path(sys.argv[1]), {"bits": 4, "group_size": 32}
    others = {
        "awq": (awq(folder), {"quant_method": "awq", "zero_point": True, "version": "gemm"}),
        "gptq": (gptq(folder, symmetric=True), {"quant_method": "gptq", "sym": True, "desc_act": False}),
        "gptq, zeros": (gptq(folder, symmetric=False), {"quant_method": "gptq", "sym": False, "desc_act": False}),
    }
    for name, (stored, config) in others.items():
        tensors |= {f"{name}/{end}": x.contiguous() for end, x in stored.items()}
        configs[name] = json.dumps(config | settings)
    for name, (form, weights) in CASES.items():
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = torch.randn(OUT, WIDTH)
        scale, zero = scales_of(weight, args)
        state = {"weight": weight, "weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        read = compressor.decompress(stored, scheme)
        tensors |= {f"{name}/{end}": x.contiguous() for end, x in stored.items()}
        tensors[f"{name}/values"] = read["weight"].contiguous()
        configs[name] = json.dumps(
            {
                "quant_method": "compressed-tensors",
                "format": form,
                "config_groups": {"group_0": scheme.model_dump(mode="json")},
                "ignore": ["lm_head"],
            }
        )
    save_file(tensors, Path(__file__).with_name("linear.safetensors"), configs)


if __name__ == "__main__":
    main()
