"""Kernels are compiled as they are imported, which other processors cannot do."""

from tests.core.engine.model.test_backend import HAS_KERNELS

collect_ignore_glob = [] if HAS_KERNELS else ["test_*.py"]
