"""bitwright: post-training quantization of language models, from a float checkpoint to a packed low-bit one."""
