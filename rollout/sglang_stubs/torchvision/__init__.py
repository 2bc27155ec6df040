"""Stands in for torchvision in CPU engine processes, which serve text models only.

SGLang and transformers import names from torchvision whatever the model is, and PyPI's wheel is linked against a CUDA
torch: with a CPU torch its import fails ("operator torchvision::nms does not exist"). Every name imports; none can be
called.
"""

__version__ = "0.28.0"


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args, **kwargs):
        raise NotImplementedError(f"torchvision.{name}: image models need a CUDA installation")

    return unavailable
