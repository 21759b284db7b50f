"""DeepSeek-V4 of Hugging Face transformers on this package's kernels.

    from dsv4_kernels.integrations.transformers import swap_in
    model = swap_in(AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16", device_map="cuda"))
    model.generate(...)

or the experts alone, of any model whose experts are SwiGLU with FP4 weights:

    from dsv4_kernels.integrations import transformers as dsv4
    dsv4.register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="dsv4_kernels")
"""

from dsv4_kernels.integrations.transformers.experts import register
from dsv4_kernels.integrations.transformers.model import PARTS, swap_in

__all__ = ["PARTS", "register", "swap_in"]
