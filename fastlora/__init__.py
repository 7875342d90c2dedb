"""fastlora: a LoRA linear layer fused in forward and backward.

    y = x @ W.T + alpha * (drop(x) @ B.T) @ A.T + bias

Triton kernels compute it for fp16 and bf16 on NVIDIA GPUs, plain PyTorch everywhere else. Importing the
package does not load Triton or query any device.
"""

from fastlora import reference
from fastlora.adapters import load_adapter, save_adapter
from fastlora.disable import disable_adapter
from fastlora.function import lora_linear, plan
from fastlora.group import group_projections, lora_linear_group, ungroup_projections
from fastlora.linear import FusedLoRALinear
from fastlora.overview import summary
from fastlora.paths import use_path
from fastlora.peft import fuse_peft, unfuse_peft
from fastlora.surgery import adapter_state_dict, apply_lora, load_adapter_state_dict, merge_lora

__version__ = "0.1.0"

__all__ = [
    "FusedLoRALinear",
    "adapter_state_dict",
    "apply_lora",
    "disable_adapter",
    "fuse_peft",
    "group_projections",
    "load_adapter",
    "load_adapter_state_dict",
    "lora_linear",
    "lora_linear_group",
    "merge_lora",
    "plan",
    "reference",
    "save_adapter",
    "summary",
    "unfuse_peft",
    "ungroup_projections",
    "use_path",
]
