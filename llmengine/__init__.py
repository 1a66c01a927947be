"""llmengine: pretrain and fine-tune transformers at the speed of the hardware, on GPUs and CPUs."""

__version__ = "0.1.0"
