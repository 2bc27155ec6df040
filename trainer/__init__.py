"""Groups in, new weights out: Megatron-core behind one trainer.

Importing this package costs nothing and makes `megatron.core` importable without CUDA, whichever of its modules comes
first.
"""

from trainer import megatron_cpu

megatron_cpu.install()
