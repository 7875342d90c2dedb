"""fastlora: a LoRA linear layer fused in forward and backward.

    y = x @ W.T + alpha * (drop(x) @ B.T) @ A.T + bias

Triton kernels compute it for fp16 and bf16 on NVIDIA GPUs, plain PyTorch everywhere else. Importing the
package loads no Triton and asks no device.
"""

from fastlora import reference
from fastlora.function import lora_linear
from fastlora.linear import FusedLoRALinear
from fastlora.planner import plan, use_path

__version__ = "0.1.0"

__all__ = ["FusedLoRALinear", "lora_linear", "plan", "reference", "use_path"]
